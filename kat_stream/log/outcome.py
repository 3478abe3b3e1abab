"""What a handler says became of a message, and what a transform handler is.

    Emit(*records, done=())    finished; these records follow from it, and these held messages are finished with it
    Hold()                     transform only: stays open until a later Emit names its position
    Retry(after_s, reason)     again after a pause: under 2 s, or in a transform, here; else through a delay tier, which
                               rounds up to 10, 60 or 600 s; a dead letter once the attempts are used up
    Reject(reason)             a dead letter now

A DataError raised by a handler counts as Reject, a retriable KatError as Retry; anything else stops the stage.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from kat_stream.log.base import Delivered, Position
from topics.record import Record


class Emit:
    """The message is finished. `done`: positions of held messages that are finished with it."""

    __slots__ = ("done", "records")

    def __init__(self, *records: Record, done: Iterable[Position] | None = None) -> None:
        self.records = records
        self.done = tuple(done or ())


@dataclass(frozen=True, slots=True)
class Hold:
    """The message stays open: after a restart it is read again."""


@dataclass(frozen=True, slots=True)
class Retry:
    after_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class Reject:
    reason: str
    error_type: str = "Reject"


Outcome = Emit | Hold | Retry | Reject
WorkHandler = Callable[[Delivered], Awaitable[Outcome]]


class TransformHandler(Protocol):
    """State per partition number; messages of one partition are handled one after the other, in order."""

    def assigned(self, partition: int, replay: Sequence[Delivered]) -> None:
        """Begin with this partition: `replay` is what the stage itself wrote there, oldest first."""

    def revoked(self, partition: int) -> None:
        """Forget this partition: another member has it, or it is read again from its committed place."""

    async def handle(self, delivered: Delivered) -> Outcome: ...
