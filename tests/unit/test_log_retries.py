"""The delay tiers agree with the catalogue, and a message ends as one that can be written, whatever it holds."""

from __future__ import annotations

from collections.abc import Callable

import anyio
import pytest

from kat_stream.log import Delivered, Emit, MemoryLog, Outcome, Position, Retry
from kat_stream.log.dead_letter_cap import DeadLetterCap
from kat_stream.log.dead_letters import pending, replay
from kat_stream.log.handling import Handling, Settled
from kat_stream.log.message import check, largest, seal, size_of
from kat_stream.log.retries import TIERS, attempt_of, wait_s
from kat_stream.log.trace import fresh
from tests.contract.log_records import everything, reward
from topics import CATALOGUE, DeadLetter, Deferred, decode_any
from topics.catalogue import topic_named

LARGE = largest(topic_named("dead.letters")) + 1
PLACE = Position("rewards", 3, 17)


def test_tiers_are_topics_with_the_partitions_of_groups_and_wait_as_long_as_they_say() -> None:
    for name, seconds in TIERS.items():
        assert name == f"retries.{seconds:g}s"
        assert topic_named(name).record is Deferred
        assert topic_named(name).partitions == topic_named("rewards").partitions


def delivered(value: bytes | None = None, key: bytes = b"k", **headers: bytes) -> Delivered:
    """A reward, or what stands where one should."""
    sealed = seal(reward(0))
    return Delivered(PLACE, key, sealed.value if value is None else value, {**sealed.headers, **headers}, 0)


async def _read(message: Delivered) -> Outcome:
    message.record()
    return Emit()


async def _waits(message: Delivered) -> Outcome:
    return Retry(60.0, "the judge is away")


def settled(message: Delivered, handle: object = _read) -> DeadLetter:
    """The letter that a message ends as, which can be written."""
    handling = Handling("s", handle, max_attempts=3, cap=DeadLetterCap(), tiers=True)  # type: ignore[arg-type]
    found = anyio.run(handling.settle, message)
    assert isinstance(found, Settled)
    (written,) = found.messages
    check(written)
    letter = decode_any("DeadLetter/1", written.value)
    assert isinstance(letter, DeadLetter)
    return letter


TOO_LARGE: dict[str, Callable[[], Delivered]] = {
    "value": lambda: delivered(b"\xc1" + bytes(LARGE)),
    "key": lambda: delivered(b"\xc1", bytes(LARGE)),
    "header": lambda: delivered(b"\xc1", x=bytes(LARGE)),
    "many headers": lambda: delivered(bytes(LARGE - (64 << 10)), **{f"{number:x}": b"" for number in range(10_000)}),
    "what its reason quotes": lambda: delivered(record=b"x" * LARGE),
}


@pytest.mark.parametrize("kind", TOO_LARGE)
def test_a_message_that_no_letter_holds_is_a_letter_that_says_where_it_lies(kind: str) -> None:
    message = TOO_LARGE[kind]()
    letter = settled(message)
    assert letter.left_out == size_of(message) and (letter.value, letter.key, letter.headers) == (b"", b"", ())
    assert (letter.stage, letter.topic, letter.partition, letter.offset) == ("s", *PLACE)
    assert letter.message.endswith(f"({letter.left_out} bytes, too large for a letter; they lie at rewards[3]@17)")


def test_a_message_that_a_letter_holds_is_there_byte_for_byte() -> None:
    message = delivered(b"\xc1" + bytes(LARGE - (64 << 10)))
    letter = settled(message)
    assert (letter.value, letter.headers, letter.left_out) == (message.value, tuple(message.headers.items()), 0)


def test_a_message_too_large_for_a_tier_is_a_letter_with_the_reason_of_its_retry() -> None:
    letter = settled(delivered(bytes(LARGE)), _waits)
    assert letter.error_type == "Retry" and letter.message.startswith("the judge is away; it cannot wait")


NO_NUMBERS = (b"", b"0", b"-1", b"two", b"2000", b"9" * 400, b"9" * 5000, b"\xff")


@pytest.mark.parametrize("text", NO_NUMBERS, ids=lambda text: text[:8])
def test_a_header_that_is_no_attempt_counts_as_the_first(text: bytes) -> None:
    assert attempt_of(delivered(attempt=text)) == 1
    assert attempt_of(delivered(attempt=b"999")) == 999


@pytest.mark.parametrize("text", NO_NUMBERS, ids=lambda text: text[:8])
def test_a_header_that_is_no_time_is_due_now(text: bytes) -> None:
    waiting = Delivered(Position("retries.60s", 0, 0), None, b"", {"stage": b"s", "due": text}, 0)
    assert wait_s(waiting, "s") == 0.0


@pytest.mark.parametrize(
    "text", [b"00-\xff\xfe-00-01", b"00-" + b"z" * 32 + b"-0-1", b"---", b"00-" + b"0" * 5000 + b"-0-1"]
)
def test_a_trace_that_is_none_begins_a_new_one(text: bytes) -> None:
    _, trace_id, _, _ = fresh(text).decode().split("-")
    assert len(bytes.fromhex(trace_id)) == 16
    assert settled(delivered(b"\xc1", traceparent=text)).headers[-1] == ("traceparent", text)


def test_what_cannot_be_put_back_stays_and_holds_up_no_other_letter() -> None:
    above_its_topic = b"\xc1" + bytes(largest(topic_named("rewards")))
    letters = [settled(delivered(value)) for value in (b"\xc1" + bytes(LARGE), above_its_topic, b"\xc1")]

    async def scenario() -> None:
        log = MemoryLog()
        await log.apply_topics(CATALOGUE)
        await log.publish(*letters)
        stays = [letter.stays async for letter in replay(log, lambda letter: True)]
        assert "bytes are not in it" in stays[0] and "the topic takes" in stays[1] and stays[2] == ""
        assert [back.value for back in await everything(log, "rewards")] == [b"\xc1"]
        assert [letter.number async for letter in pending(log, lambda letter: True)] == [0, 1]

    anyio.run(scenario)
