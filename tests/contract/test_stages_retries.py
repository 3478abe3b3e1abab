"""Long retries, the cap on dead letters, and fair polling, on both logs."""

from __future__ import annotations

import itertools
import time
from collections import Counter

import anyio
import pytest

from kat_stream.errors import TooManyDeadLetters, VerifierError
from kat_stream.log import Delivered, Emit, Log, Outcome, Reject, Retry, TopicPartition, run_transform, run_work
from kat_stream.log.dead_letter_cap import DeadLetterLimit
from kat_stream.log.retries import TIERS
from tests.contract.conftest import STAGES
from tests.contract.log_records import (
    GroupJoin,
    entry,
    everything,
    groups_on_one_partition,
    nothing,
    reward,
    until_committed,
)
from tests.contract.stages_kit import scored, working
from tests.waiting import until
from topics import Reward, partition_of

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(180), pytest.mark.parametrize("connect", STAGES, indirect=True)]


async def test_a_long_retry_waits_in_a_tier_and_its_partition_goes_on(log: Log, first_tier_s: float) -> None:
    group = groups_on_one_partition(1)[0]
    await log.publish(*[reward(number, group) for number in range(4)])
    seen: list[tuple[int, str, int, float]] = []

    async def handle(delivered: Delivered) -> Outcome:
        attempt = int(delivered.headers.get("attempt", b"1"))
        seen.append((scored(delivered), delivered.position.topic, attempt, time.monotonic()))
        if scored(delivered) == 0 and attempt == 1:
            return Retry(first_tier_s, "the judge is away")
        return Emit(entry(group, str(scored(delivered))))

    async def is_not_meant(delivered: Delivered) -> Outcome:
        others.append(delivered.position)
        return Emit()

    others: list[object] = []
    stopping = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(
            lambda: run_work(log, ["train.steps"], group="other", member="o", handler=is_not_meant, stopping=stopping)
        )
        async with working(log, handle, max_in_flight=1):
            await until(lambda: len(seen) == 5)
            await until_committed(log, "w", "rewards", *TIERS)
            await until_committed(log, "other", "retries.10s")
        stopping.set()
    assert [(score, topic, attempt) for score, topic, attempt, _ in seen] == [
        (0, "rewards", 1),
        (1, "rewards", 1),
        (2, "rewards", 1),
        (3, "rewards", 1),
        (0, "rewards", 2),
    ]
    assert seen[4][3] - seen[0][3] > first_tier_s - 0.5
    assert others == []
    (waited,) = await everything(log, *TIERS)
    assert waited.position.topic_partition == ("retries.10s", partition_of(reward(0, group)))
    assert waited.headers["stage"] == b"w" and int(waited.headers["due"]) > waited.timestamp_ms
    assert {d.record().rollout_id for d in await everything(log, "ledger")} == {"0", "1", "2", "3"}  # type: ignore[attr-defined]


async def test_attempts_are_counted_across_a_tier_and_end_as_a_dead_letter_with_the_raw_bytes(
    log: Log, first_tier_s: float
) -> None:
    await log.publish(reward(0))
    attempts: list[bytes] = []

    async def never(delivered: Delivered) -> Outcome:
        attempts.append(delivered.headers.get("attempt", b"1"))
        if len(attempts) == 2:
            raise VerifierError("a short pause, in place")
        return Retry(first_tier_s, "not today")

    async with working(log, never, max_attempts=3):
        await until(lambda: len(attempts) == 3)
        await until_committed(log, "w", "rewards", *TIERS)
    assert attempts == [b"1", b"2", b"3"]
    (letter,) = [d.record() for d in await everything(log, "dead.letters")]
    (sent,) = await everything(log, "rewards")
    assert (letter.topic, letter.offset, letter.value) == ("rewards", 0, sent.value)  # type: ignore[attr-defined]
    assert dict(letter.headers)["record"] == b"Reward/1" and dict(letter.headers)["attempt"] == b"3"  # type: ignore[attr-defined]
    assert letter.message == "not today (3 attempts)"  # type: ignore[attr-defined]


LIMIT = DeadLetterLimit(most=5, share=0.5, window_s=60.0)


async def test_work_stops_before_it_drains_its_topic_into_dead_letters(log: Log) -> None:
    group = groups_on_one_partition(1)[0]
    await log.publish(*[reward(number, group) for number in range(40)])

    async def bad_deploy(delivered: Delivered) -> Outcome:
        return Reject("this build knows no rewards")

    with pytest.raises(TooManyDeadLetters, match="kat-stream dead-letters replay") as stopped:
        await run_work(
            log,
            ["rewards"],
            group="w",
            member="m",
            handler=bad_deploy,
            stopping=anyio.Event(),
            max_in_flight=1,
            dead_letters=LIMIT,
        )
    assert not stopped.value.retriable
    assert len(await everything(log, "dead.letters")) == 5
    assert (await log.committed("w"))[TopicPartition("rewards", partition_of(reward(0, group)))] == 5


async def test_transform_stops_with_nothing_of_that_batch_visible(log: Log) -> None:
    group = groups_on_one_partition(1)[0]
    await log.publish(*[reward(number, group) for number in range(40)])

    class BadDeploy(GroupJoin):
        async def handle(self, delivered: Delivered) -> Outcome:
            return Reject("this build knows no rewards")

    with pytest.raises(TooManyDeadLetters):
        await run_transform(
            log,
            ["rewards"],
            group="t",
            member="m",
            handler=BadDeploy(),
            stopping=anyio.Event(),
            batch=2,
            dead_letters=LIMIT,
        )
    assert len(await everything(log, "dead.letters")) == 4
    assert sum((await log.committed("t")).values()) in (4, 6)  # on Kafka a marker may lie behind the place


async def test_a_few_bad_messages_among_good_ones_stop_nothing(log: Log) -> None:
    await log.publish(*[reward(number, f"g{number}") for number in range(60)])

    handled = itertools.count(1)  # by turn and not by number: in which order partitions come is the log's business

    async def a_third_is_bad(delivered: Delivered) -> Outcome:
        return Reject("threes") if next(handled) % 3 == 0 else Emit()

    async with working(log, a_third_is_bad, max_in_flight=1, dead_letters=LIMIT):
        await until_committed(log, "w", "rewards")
    assert len(await everything(log, "dead.letters")) == 20


async def test_messages_come_by_age_and_not_by_partition(log: Log) -> None:
    """One at a time, as a full worker takes them. Partition by partition the mean displacement would be about 90."""
    count = 240
    for number in range(count):
        await log.publish(reward(number, f"g{number % 40}"))
        await anyio.sleep(0.001)  # an age is in milliseconds: each has its own
    member = await log.join(["rewards"], group="f", member="m", on_revoked=nothing)
    order: list[int] = []
    with anyio.fail_after(60):
        while len(order) < count:
            order += [scored(delivered) for delivered in await member.poll(limit=1, timeout_s=0.5)]
    await member.leave()
    assert sorted(order) == list(range(count))
    assert sum(abs(place - number) for place, number in enumerate(order)) / count < 10


async def test_a_paused_partition_gives_nothing_and_its_position_is_what_was_handed_out(log: Log) -> None:
    first = reward(0, "g0")
    second = next(r for r in map(other, range(1, 99)) if partition_of(r) != partition_of(first))
    await log.publish(*[reward(number, first.group_id) for number in range(3)])
    member = await log.join(["rewards"], group="f", member="m", on_revoked=nothing)
    place = TopicPartition("rewards", partition_of(first))
    got: list[Delivered] = []
    with anyio.fail_after(30):
        while not got:
            got = await member.poll(limit=1, timeout_s=0.5)
    assert await member.position(place) == 1
    member.pause(place)
    await log.publish(second)
    with anyio.fail_after(30):
        while len(got) < 2:
            got += await member.poll(limit=10, timeout_s=0.5)
    assert [delivered.position.partition for delivered in got] == [place.partition, partition_of(second)]
    member.seek(place, 0)
    member.resume(place)
    again: Counter[int] = Counter()
    with anyio.fail_after(30):
        while again.total() < 3:
            again.update(scored(delivered) for delivered in await member.poll(limit=10, timeout_s=0.5))
    assert again == Counter([0, 1, 2])
    await member.leave()


def other(number: int) -> Reward:
    return reward(9, f"g{number}")
