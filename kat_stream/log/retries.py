"""Retries that take longer than a moment: the message waits in a delay tier, and its partition goes on.

A tier has the partitions of the group topics, and a message waits in the partition that it came from. Every stage that
works (`run_work`) reads the tiers in its own group and passes over what is not its own by header.
Invariant: a message is deferred in the place of being finished, so it is either in its topic, unfinished, or in a tier.
Within a tier all wait equally long: the head of a partition is the first that is due.
"""

from __future__ import annotations

import re
import time
from dataclasses import replace

import msgspec

from kat_stream.errors import DecodeError
from kat_stream.log.base import Delivered, Message, Position
from kat_stream.log.trace import fresh
from topics.deferred import Deferred
from topics.record import encode, header_of

TIERS = {"retries.10s": 10.0, "retries.60s": 60.0, "retries.600s": 600.0}
"""Topic -> seconds; shortest first."""
IN_PLACE_S = 2.0
"""Shorter waits are not worth a trip through the log."""
ATTEMPT = "attempt"
_ATTEMPT = re.compile(rb"[1-9][0-9]{0,2}")
_DUE = re.compile(rb"[0-9]{1,15}")


def attempt_of(delivered: Delivered) -> int:
    """Which attempt this delivery is, from 1 to 999; whatever else the header says counts as the first."""
    text = delivered.headers.get(ATTEMPT, b"")
    return int(text) if _ATTEMPT.fullmatch(text) else 1


def numbered(delivered: Delivered, attempt: int) -> Delivered:
    return replace(delivered, headers={**delivered.headers, ATTEMPT: str(attempt).encode()})


def defer(delivered: Delivered, stage: str, after_s: float, reason: str, run: str) -> Message:
    """The message for the shortest tier that waits at least `after_s`; what exceeds the longest waits there."""
    tier = next((name for name, seconds in TIERS.items() if seconds >= after_s), "retries.600s")
    topic, partition, offset = delivered.position
    record = Deferred(
        run=run,
        stage=stage,
        topic=topic,
        partition=partition,
        offset=offset,
        attempt=attempt_of(delivered),
        reason=reason,
        timestamp_ms=delivered.timestamp_ms,
        value=delivered.value,
        key=delivered.key or b"",
        headers=tuple(delivered.headers.items()),
    )
    headers = {
        "record": header_of(Deferred).encode(),
        "traceparent": fresh(delivered.headers.get("traceparent")),
        "stage": stage.encode(),
        "due": str(int((time.time() + TIERS[tier]) * 1000)).encode(),
    }
    return Message(tier, partition, delivered.key, encode(record), headers)


def is_for(delivered: Delivered, stage: str) -> bool:
    """Whether a stage is meant: everything outside the tiers, and its own messages in them."""
    return delivered.position.topic not in TIERS or delivered.headers.get("stage") == stage.encode()


def wait_s(delivered: Delivered, stage: str) -> float:
    """Seconds until a message is due: never more than its tier's, whatever the clocks say; 0 outside the tiers."""
    if delivered.position.topic not in TIERS or not is_for(delivered, stage):
        return 0.0
    due = delivered.headers.get("due", b"")
    remaining = int(due) / 1000 - time.time() if _DUE.fullmatch(due) else 0.0
    return min(max(0.0, remaining), TIERS[delivered.position.topic])


def restored(delivered: Delivered) -> Delivered:
    """What was deferred, as it was delivered first, with its attempt; anything else, and what is broken, as it is."""
    if delivered.position.topic not in TIERS:
        return delivered
    try:
        record = delivered.record()
    except DecodeError:
        return delivered  # its handler finds no record in it either: a dead letter
    if not isinstance(record, Deferred):
        return delivered
    position = Position(record.topic, record.partition, record.offset)
    headers = msgspec.convert(dict(record.headers), dict[str, bytes])
    return Delivered(position, record.key or None, record.value, headers, record.timestamp_ms)
