"""The `traceparent` header (W3C trace context): one trace a rollout, without a tracing server.

Invariant: records of one rollout share a trace id, whichever process writes them, because it is a hash of `rollout_id`.
Records without a rollout inherit the trace of the message that is being handled.
"""

from __future__ import annotations

import os
import re
from contextvars import ContextVar
from hashlib import blake2b

from topics.record import Record

current: ContextVar[bytes | None] = ContextVar("traceparent", default=None)
"""The traceparent of the message being handled in this task."""
_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")


def trace_id_of(rollout_id: str) -> str:
    """32 hex digits."""
    return blake2b(rollout_id.encode(), digest_size=16).hexdigest()


def traceparent_of(record: Record) -> bytes:
    """`00-<trace>-<span>-01` with a new span."""
    rollout_id = getattr(record, "rollout_id", "")
    return _span(trace_id_of(rollout_id)) if rollout_id else fresh(current.get())


def fresh(parent: bytes | None) -> bytes:
    """A new span of the parent's trace, or of a new trace if it has none: another program's header may be anything."""
    found = _TRACEPARENT.fullmatch(parent or b"")
    return _span(found[1].decode() if found else os.urandom(16).hex())


def _span(trace_id: str) -> bytes:
    return f"00-{trace_id}-{os.urandom(8).hex()}-01".encode()
