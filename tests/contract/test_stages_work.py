"""`run_work` on both logs: nothing lost, only the unfinished repeated, bad input to dead letters, a quick stop."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Awaitable, Callable

import anyio
import pytest

from kat_stream.errors import TaskError, VerifierError
from kat_stream.log import Delivered, Emit, Log, Message, Outcome, Reject, Retry, TopicPartition, run_work
from kat_stream.log.lag import lags
from tests.contract.conftest import STAGES, Connect
from tests.contract.log_records import (
    committed_up_to_end,
    entry,
    everything,
    groups_on_one_partition,
    reward,
    until_committed,
)
from tests.contract.stages_kit import scored, working
from tests.waiting import until
from topics import DeadLetter, encode

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("connect", STAGES, indirect=True)]


async def test_each_message_is_handled_and_what_follows_is_published(log: Log) -> None:
    await log.publish(*[reward(number, f"g{number}") for number in range(60)])

    async def handle(delivered: Delivered) -> Outcome:
        return Emit(entry(delivered.record().group_id, str(scored(delivered))))  # type: ignore[attr-defined]

    async with working(log, handle):
        await until_committed(log, "w", "rewards")
    got = Counter(d.record().rollout_id for d in await everything(log, "ledger"))  # type: ignore[attr-defined]
    assert got == Counter(str(number) for number in range(60))


async def settled_members(log: Log, names: set[str]) -> dict[str, tuple[TopicPartition, ...]]:
    """What each member of the group owns, once exactly these are in it."""

    async def settled() -> dict[str, tuple[TopicPartition, ...]] | None:
        for group in await log.groups():
            if group.name == "w" and set(group.members) == names and all(group.members.values()):
                return dict(group.members)
        return None

    return await until(settled, f"{names} settled")  # type: ignore[return-value]


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_crashes_at_random_points_lose_nothing_and_repeat_only_what_was_unfinished(
    connect: Connect, seed: int
) -> None:
    log, dice, count = await connect(), random.Random(seed), 40
    groups = groups_on_one_partition(2) + ["another", "third"]
    await log.publish(*[reward(number, dice.choice(groups)) for number in range(count)])
    finished: set[int] = set()
    repeated: set[int] = set()
    lives = 0
    while len(finished) < count:
        lives += 1
        assert lives < 60
        before, crash_after = frozenset(finished), dice.randrange(1, 12)
        done_now: list[int] = []

        async def handle(delivered: Delivered, before=before, done_now=done_now, crash_after=crash_after) -> Outcome:  # type: ignore[no-untyped-def]
            number = scored(delivered)
            repeated.update({number} & before)
            for _ in range(dice.randrange(6)):
                await anyio.sleep(dice.random() * 0.01)
            if len(done_now) >= crash_after:
                raise RuntimeError("the process dies here")
            done_now.append(number)
            return Emit()

        client = await connect()
        try:
            with anyio.move_on_after(60):
                async with working(client, handle, max_in_flight=6) as stage:
                    await until(lambda: len(finished | set(done_now)) == count)  # noqa: B023
                    await stage.stop()
        except* RuntimeError:
            pass
        finished |= set(done_now)
    assert lives > 2
    assert finished == set(range(count))
    assert repeated == set()
    await until_committed(log, "w", "rewards")


async def test_a_slow_message_neither_blocks_others_nor_repeats_them_after_a_restart(log: Log) -> None:
    group = groups_on_one_partition(1)[0]
    await log.publish(*[reward(number, group) for number in range(30)])
    handled: Counter[int] = Counter()

    async def first_is_slow(delivered: Delivered) -> Outcome:
        handled[scored(delivered)] += 1
        if scored(delivered) in (0, 7):
            await anyio.sleep_forever()
        return Emit()

    async with working(log, first_is_slow, drain_s=0.1):
        await until(lambda: len(handled) == 30)
    (lag,) = [lag for lag in await lags(log, ages=True) if lag.topic == "rewards"]
    assert (lag.group, lag.topic, lag.messages) == ("w", "rewards", 2)
    assert lag.seconds is not None and 0 < lag.seconds < 120

    async def quick(delivered: Delivered) -> Outcome:
        handled[scored(delivered)] += 1
        return Emit()

    async with working(log, quick):
        await until_committed(log, "w", "rewards")
    assert {number for number, times in handled.items() if times > 1} == {0, 7}
    assert {lag.messages for lag in await lags(log)} == {0}


async def test_members_come_and_go_and_nothing_is_lost_or_done_twice(connect: Connect) -> None:
    log, done = await connect(), Counter[int]()
    by_member: dict[str, int] = Counter()

    def handler(name: str) -> Callable[[Delivered], Awaitable[Outcome]]:
        async def handle(delivered: Delivered) -> Outcome:
            await anyio.sleep(0.002)
            done[scored(delivered)] += 1
            by_member[name] += 1
            return Emit()

        return handle

    async def publish(start: int) -> None:
        await log.publish(*[reward(number, f"g{number}") for number in range(start, start + 100)])

    async with working(await connect(), handler("a"), member="a"):
        await publish(0)
        await until(lambda: by_member["a"] > 10)
        async with working(await connect(), handler("b"), member="b") as second:
            owned = await settled_members(log, {"a", "b"})
            assert {name: len(partitions) for name, partitions in owned.items()} == {"a": 24, "b": 24}
            assert len(set().union(*owned.values())) == 48
            assert [sum(place.topic == "rewards" for place in places) for places in owned.values()] == [6, 6]
            await publish(100)
            await until(lambda: by_member["b"] > 0)
            await second.stop()
        await publish(200)
        await until(lambda: len(done) == 300)
        await until_committed(log, "w", "rewards")
    assert sorted(done) == list(range(300))
    assert {number for number, times in done.items() if times > 1} == set()


async def test_what_cannot_be_used_becomes_a_dead_letter_and_the_stage_goes_on(log: Log) -> None:
    good, bad = encode(reward(3)), b"\xc1 not msgpack"
    headers = {"record": b"Reward/1"}
    await log.append(Message("rewards", 1, b"k", bad, headers), Message("rewards", 1, b"k", good, headers))
    await log.append(Message("rewards", 1, b"k", encode(reward(4)), headers))

    async def handle(delivered: Delivered) -> Outcome:
        if scored(delivered) == 4:
            return Reject("no use for fours")
        return Emit(entry("g", "three"))

    async with working(log, handle):
        await until_committed(log, "w", "rewards")
    assert len(await everything(log, "ledger")) == 1
    letters = [d.record() for d in await everything(log, "dead.letters")]
    assert all(isinstance(letter, DeadLetter) for letter in letters)
    by_offset = {letter.offset: letter for letter in letters}  # type: ignore[attr-defined]
    assert by_offset.keys() == {0, 2}
    broken, rejected = by_offset[0], by_offset[2]
    assert (broken.stage, broken.topic, broken.partition, broken.value) == ("w", "rewards", 1, bad)  # type: ignore[attr-defined]
    assert broken.error_type == "DecodeError" and broken.run == ""  # type: ignore[attr-defined]
    assert dict(broken.headers)["record"] == b"Reward/1" and broken.key == b"k"  # type: ignore[attr-defined]
    assert (rejected.error_type, rejected.message, rejected.run) == ("Reject", "no use for fours", "r")  # type: ignore[attr-defined]


async def test_retries_are_counted_and_end_as_a_dead_letter(log: Log) -> None:
    await log.publish(*[reward(number) for number in range(3)])
    attempts: Counter[int] = Counter()

    async def handle(delivered: Delivered) -> Outcome:
        number = scored(delivered)
        attempts[number] += 1
        if number == 0:
            return Retry(0.001, "not yet")
        if number == 1 and attempts[1] < 3:
            raise VerifierError("the grader hiccups")
        if number == 2:
            raise TaskError("task t has no tests")
        return Emit(entry("g", str(number)))

    async with working(log, handle, max_attempts=3):
        await until_committed(log, "w", "rewards")
    assert attempts == {0: 3, 1: 3, 2: 1}
    assert [d.record().rollout_id for d in await everything(log, "ledger")] == ["1"]  # type: ignore[attr-defined]
    letters = [d.record() for d in await everything(log, "dead.letters")]
    assert sorted((letter.error_type, letter.message) for letter in letters) == [  # type: ignore[attr-defined]
        ("Retry", "not yet (3 attempts)"),
        ("TaskError", "task t has no tests"),
    ]


async def test_an_unclassified_error_stops_the_stage_and_keeps_the_message(log: Log) -> None:
    await log.publish(reward(0))

    async def breaks(delivered: Delivered) -> Outcome:
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError, match="a bug"):
        await run_work(log, ["rewards"], group="w", member="m", handler=breaks, stopping=anyio.Event())
    assert sum((await log.committed("w")).values()) == 0
    assert await everything(log, "dead.letters") == []


async def test_members_that_stop_together_commit_what_each_of_them_ended(connect: Connect) -> None:
    """The one without work leaves at once, and the other's partitions move while its task ends."""
    log, other = await connect(), await connect()
    worked = Counter[int]()
    through = anyio.Event()

    async def handle(delivered: Delivered) -> Outcome:
        worked[scored(delivered)] += 1
        await through.wait()
        return Emit(entry("g", "0"))

    async def settled(*names: str) -> None:
        async def stable() -> bool:
            return [(group.state, {*group.members}) for group in await log.groups()] == [("Stable", {*names})]

        await until(stable, f"{names} settled")

    async with working(log, handle, member="a") as first, working(other, handle, member="b") as second:
        await settled("a", "b")
        await log.publish(reward(0))
        await until(lambda: worked.total() == 1)
        first.event.set()
        second.event.set()
        await until(lambda: first.ended.is_set() or second.ended.is_set())
        await settled("b" if first.ended.is_set() else "a")
        through.set()
    assert await committed_up_to_end(log, "w", "rewards")
    assert len(await everything(log, "ledger")) == 1 and worked == {0: 1}


async def test_stop_does_not_wait_for_a_task_beyond_the_drain_deadline(log: Log) -> None:
    await log.publish(reward(0))
    started, cancelled = anyio.Event(), []

    async def endless(delivered: Delivered) -> Outcome:
        started.set()
        try:
            await anyio.sleep_forever()
        finally:
            cancelled.append(delivered.position)
        return Emit()

    async with working(log, endless, drain_s=0.2) as stage:
        with anyio.fail_after(20):
            await started.wait()
        await stage.stop(within_s=5.0)
    assert len(cancelled) == 1
