"""`dead.letters`: a message that a stage could not use, byte for byte, with where it came from and why."""

from __future__ import annotations

from topics.record import Record


class DeadLetter(Record, frozen=True, kw_only=True, tag="DeadLetter/1"):
    stage: str
    topic: str
    partition: int
    offset: int
    error_type: str
    message: str
    value: bytes
    key: bytes = b""
    headers: tuple[tuple[str, bytes], ...] = ()
