"""`retries.10s`, `retries.60s`, `retries.600s`: a message that a stage tries again later, byte for byte.

The message's headers `stage` and `due` (Unix milliseconds) say without decoding whose it is and when; its partition is
that of the message inside.
"""

from __future__ import annotations

from topics.record import Record


class Deferred(Record, frozen=True, kw_only=True, tag="Deferred/1"):
    stage: str
    topic: str
    partition: int
    offset: int
    attempt: int
    """The attempt that is to come, from 2 on."""
    reason: str
    timestamp_ms: int
    value: bytes
    key: bytes = b""
    headers: tuple[tuple[str, bytes], ...] = ()
