"""Dead letters as a set: which are still to be put back, and putting them back.

Invariant: a letter goes back to its topic and partition at most once. The message and the mark of its letter are one
transaction of the one writer `dead-letters`; it is opened, which fences any earlier one, before the letters are read.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from kat_stream.errors import DataError, DecodeError
from kat_stream.log.base import Delivered, Log, Message, Position
from kat_stream.log.message import check, seal
from kat_stream.log.retries import ATTEMPT
from topics.dead_letter import DeadLetter

logger = logging.getLogger(__name__)

WRITER = "dead-letters"
CATCH_UP_S = 120.0
REPLAYED = "replayed"
"""Header of a message that was put back: the offset of its letter."""


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter, where it lies in dead.letters, and whether it was put back."""

    number: int
    timestamp_ms: int
    record: DeadLetter
    replayed: bool = False

    def original(self) -> Delivered:
        """The message as its stage got it."""
        record = self.record
        position = Position(record.topic, record.partition, record.offset)
        return Delivered(position, record.key or None, record.value, dict(record.headers), self.timestamp_ms)

    @property
    def stays(self) -> str:
        """Why it cannot be put back; empty if it can."""
        if self.record.left_out:
            return f"its {self.record.left_out} bytes are not in it"
        try:
            check(_message(self))
        except DataError as error:
            return str(error)
        return ""


Wanted = Callable[[Letter], bool]


async def collect(messages: AsyncIterator[Delivered]) -> list[Letter]:
    """The letters among the messages of dead.letters, oldest first; what cannot be read as one is said in the log."""
    found: dict[int, Letter] = {}
    replayed: set[int] = set()
    async for delivered in messages:
        record = _read(delivered)
        if record is not None and record.replayed >= 0:
            replayed.add(record.replayed)
        elif record is not None:
            number = delivered.position.offset
            found[number] = Letter(number, delivered.timestamp_ms, record)
    return [Letter(n, one.timestamp_ms, one.record, n in replayed) for n, one in sorted(found.items())]


async def pending(log: Log, wanted: Wanted) -> AsyncIterator[Letter]:
    """What is wanted and was not put back yet."""
    async with log.follow(("dead.letters",)) as follower:
        letters = await collect(follower.catch_up(CATCH_UP_S))
    for letter in letters:
        if not letter.replayed and wanted(letter):
            yield letter


async def replay(log: Log, wanted: Wanted) -> AsyncIterator[Letter]:
    """Put back what `pending` gives; each letter comes once it is done, and one that `stays` as it was.

    FencedError: another replay has begun, and goes on with the rest.
    """
    writer = await log.writer(WRITER, group=WRITER)
    try:
        async for letter in pending(log, wanted):
            if not letter.stays:
                await writer.commit([_message(letter), seal(_mark(letter))], {})
            yield letter
    finally:
        await writer.close()


def _message(letter: Letter) -> Message:
    """As it was, with its attempts counted anew."""
    record = letter.record
    headers = {**dict(record.headers), ATTEMPT: b"1", REPLAYED: str(letter.number).encode()}
    return Message(record.topic, record.partition, record.key or None, record.value, headers)


def _mark(letter: Letter) -> DeadLetter:
    record = letter.record
    return DeadLetter(
        run=record.run,
        stage=record.stage,
        topic=record.topic,
        partition=record.partition,
        offset=record.offset,
        error_type="Replayed",
        message=f"letter {letter.number} was put back",
        value=b"",
        replayed=letter.number,
    )


def _read(delivered: Delivered) -> DeadLetter | None:
    try:
        record = delivered.record()
    except DecodeError as error:
        logger.warning("no dead letter that can be read: %s", error)
        return None
    return record if isinstance(record, DeadLetter) else None
