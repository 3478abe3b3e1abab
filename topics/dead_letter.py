"""`dead.letters`: a message that a stage could not use, byte for byte, with where it came from and why.

A letter is identified by its offset (the topic has one partition). A message that is too large for a letter stays where
it came from: a broker measures what is compressed, so it takes many times what a topic of ours holds.
What was put back is marked by a second record whose `replayed` names the letter; it is written in the transaction that
puts the message back.
"""

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
    replayed: int = -1
    """Offset of the letter that was put back: this record is its mark and no letter; -1: a letter."""
    left_out: int = 0
    """Bytes of a message that is too large for a letter: value, key and headers are empty here; 0: they are whole."""
