"""One message through a handler, to the end: short retries in place, long ones through a tier, then a dead letter.

Invariant: `settle` returns what can be written as it is, or Hold; what a handler cannot use leaves as a DeadLetter with
the raw bytes, if a letter has room for them, and an error that nobody classified leaves as itself, because it is a bug
and the stage must stop.
Attempts are counted in the header `attempt`, over all ways to try again.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import anyio
import msgspec

from kat_stream.errors import DataError, DecodeError, KatError
from kat_stream.log import trace
from kat_stream.log.base import Delivered, Message, Position
from kat_stream.log.dead_letter_cap import DeadLetterCap
from kat_stream.log.message import check, seal, size_of
from kat_stream.log.outcome import Emit, Hold, Reject, Retry, WorkHandler
from kat_stream.log.retries import IN_PLACE_S, attempt_of, defer, numbered
from kat_stream.telemetry import DEAD_LETTERS
from topics.dead_letter import DeadLetter

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 5
"""Of one message, unless a stage says otherwise; then it is a dead letter."""
FIRST_RETRY_S = 0.2
LONGEST_RETRY_S = 10.0
REASON = 10_000
"""Characters of a reason in a letter, and of a run's name where it holds no more: either may be what is so large."""


@dataclass(frozen=True, slots=True)
class Settled:
    """A finished message: what follows from it, and which held messages are finished with it."""

    messages: tuple[Message, ...]
    done: tuple[Position, ...] = ()


@dataclass(frozen=True, slots=True)
class Handling:
    """A stage's way of handling one message."""

    stage: str
    handle: WorkHandler
    max_attempts: int
    cap: DeadLetterCap
    tiers: bool
    """Whether a long retry may leave its place: not where a group's messages must stay in order."""

    async def settle(self, delivered: Delivered) -> Settled | Hold:
        """Handle until there is a final outcome; dead letters and deferred messages are written like any other.

        TooManyDeadLetters instead of one dead letter too many.
        """
        token = trace.current.set(delivered.headers.get("traceparent"))
        try:
            return await self._attempts(delivered)
        finally:
            trace.current.reset(token)

    async def _attempts(self, delivered: Delivered) -> Settled | Hold:
        attempt = attempt_of(delivered)
        while True:
            outcome = await self._once(delivered, attempt)
            if isinstance(outcome, Retry) and attempt >= self.max_attempts:
                outcome = Reject(f"{outcome.reason} ({attempt} attempts)", "Retry")
            if isinstance(outcome, Reject):
                return self._bury(delivered, outcome)
            if not isinstance(outcome, Retry):
                self.cap.handled()
                return outcome
            attempt += 1
            delivered = numbered(delivered, attempt)
            again = (self.stage, delivered.position, outcome.after_s, outcome.reason)
            logger.warning("%s: %s again in %.1f s: %s", *again)
            if self.tiers and outcome.after_s >= IN_PLACE_S:
                return self._defer(delivered, outcome)
            await anyio.sleep(outcome.after_s)

    async def _once(self, delivered: Delivered, attempt: int) -> Settled | Hold | Retry | Reject:
        try:
            outcome = await self.handle(delivered)
            return sealed(outcome) if isinstance(outcome, Emit) else outcome
        except DataError as error:
            return Reject(str(error), type(error).__name__)
        except KatError as error:
            if not error.retriable:
                raise
            pause = min(FIRST_RETRY_S * 2 ** (attempt - 1), LONGEST_RETRY_S)
            return Retry(pause, f"{type(error).__name__}: {error}")

    def _defer(self, delivered: Delivered, retry: Retry) -> Settled:
        """A dead letter if the tiers do not take a message so large."""
        deferred = defer(delivered, self.stage, retry.after_s, retry.reason, _run_of(delivered))
        try:
            check(deferred)
        except DataError as error:
            return self._bury(delivered, Reject(f"{retry.reason}; it cannot wait in a tier: {error}", "Retry"))
        self.cap.handled()
        return Settled((deferred,))

    def _bury(self, delivered: Delivered, reject: Reject) -> Settled:
        self.cap.bury(self.stage, f"{reject.error_type}: {reject.reason}")
        logger.error("%s: dead letter %s: %s: %s", self.stage, delivered.position, reject.error_type, reject.reason)
        return Settled((seal(dead_letter(delivered, self.stage, reject)),))


def sealed(emit: Emit) -> Settled:
    """What an Emit writes, as messages."""
    return Settled(tuple(seal(record) for record in emit.records), emit.done)


def dead_letter(delivered: Delivered, stage: str, reject: Reject) -> DeadLetter:
    """The message byte for byte, if a letter has room for it, with where it came from and why it could not be used.

    It is counted here, for its writer's /metrics; `stage` as the metrics of lag name it, without the run.
    """
    topic, partition, offset = delivered.position
    DEAD_LETTERS.labels(stage.rpartition(".")[2], topic, reject.error_type).inc()
    letter = DeadLetter(
        run=_run_of(delivered),
        stage=stage,
        topic=topic,
        partition=partition,
        offset=offset,
        error_type=reject.error_type,
        message=reject.reason[:REASON],
        value=delivered.value,
        key=delivered.key or b"",
        headers=tuple(delivered.headers.items()),
    )
    try:
        seal(letter)
    except DataError:
        return _without_bytes(letter, delivered)
    return letter


def _without_bytes(letter: DeadLetter, delivered: Delivered) -> DeadLetter:
    size, run = size_of(delivered), letter.run[:REASON]
    message = f"{letter.message} ({size} bytes, too large for a letter; they lie at {delivered.position})"
    return msgspec.structs.replace(letter, run=run, message=message, value=b"", key=b"", headers=(), left_out=size)


def _run_of(delivered: Delivered) -> str:
    try:
        return delivered.record().run
    except DecodeError:
        return ""
