"""`run_work` under one unlucky order of events each: what a mutation breaks, and random orders rarely meet."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from kat_stream.errors import FencedError, LogError, LogUnavailable
from kat_stream.log import (
    Committed,
    Delivered,
    MemoryLog,
    Message,
    Outcome,
    Position,
    TopicPartition,
    retries,
    run_work,
    work,
)
from kat_stream.log.memory_group import MemoryMember
from kat_stream.log.message import seal
from tests.contract.log_records import reward, until_committed
from tests.unit.stage_kit import (
    PLACE,
    Steered,
    Worker,
    ledger,
    no_pauses,
    opened,
    running_stage,
    turns,
    working,
)
from tests.waiting import until

__all__ = ["no_pauses"]
pytestmark = pytest.mark.anyio


class Unheard(Steered):
    """What is written is not acknowledged before the test says so."""

    def __init__(self, log: MemoryLog) -> None:
        super().__init__(log)
        self.waiting, self.through = anyio.Event(), anyio.Event()

    async def append(self, *messages: Message, deadline_s: float = 30.0) -> None:
        self.waiting.set()
        await self.through.wait()
        await self.log.append(*messages, deadline_s=deadline_s)


async def test_no_place_moves_past_a_message_whose_records_are_not_acknowledged() -> None:
    log, worker = await opened(), Worker()
    unheard = Unheard(log)
    await log.publish(reward(0))
    async with working(unheard, worker):
        await unheard.waiting.wait()
        await turns()
        assert (await log.committed("w")).get(PLACE, 0) == 0
        unheard.through.set()
        await until_committed(log, "w", "rewards")
    assert await ledger(log) == {"g-0": 1}


class Slow(Steered):
    """Its member's polls wait while the test holds them."""

    def __init__(self, log: MemoryLog) -> None:
        super().__init__(log)
        self.held = False
        self.waiting, self.through = anyio.Event(), anyio.Event()

    def steer(self, member: MemoryMember) -> None:
        poll = member.poll

        async def held(**how: Any) -> list[Delivered]:
            epoch = member.epoch
            if self.held:
                self.waiting.set()
                await self.through.wait()
            return await poll(**how) if member.epoch == epoch else []

        member.poll = held  # type: ignore[method-assign]


async def test_partitions_that_were_lost_and_came_back_between_two_looks_go_on_where_the_other_stopped() -> None:
    log, first, second = await opened(), Worker(), Worker()
    slow = Slow(log)
    await log.publish(*[reward(n, f"g{n}") for n in range(40)])
    async with working(slow, first, member="a"):
        await until_committed(log, "w", "rewards")
        slow.held = True
        await slow.waiting.wait()
        await log.publish(*[reward(n, f"g{n}") for n in range(40, 80)])
        async with working(log, second, member="b"):
            await until(lambda: second.worked.total() > 5)
        slow.held = False
        slow.through.set()
        await until_committed(log, "w", "rewards")
    assert first.worked + second.worked == Counter(range(80))


class Standing(Worker):
    """Works at what came before the test said so, and stands still at the rest."""

    def __init__(self, before: int) -> None:
        super().__init__()
        self.before, self.through = before, anyio.Event()

    async def handle(self, delivered: Delivered) -> Outcome:
        outcome = await super().handle(delivered)
        if max(self.worked) >= self.before:
            await self.through.wait()
        return outcome


async def test_a_stage_that_stops_lets_its_tasks_end() -> None:
    log, worker = await opened(), Standing(0)
    await log.publish(reward(0))
    async with working(log, worker) as stopping:
        await until(lambda: worker.worked.total() == 1)
        stopping.set()
        await turns()
        worker.through.set()
    assert await ledger(log) == {"g-0": 1}
    assert (await log.committed("w"))[PLACE] == 1


async def test_a_stage_that_stops_commits_what_ended_after_its_peer_left_and_starts_nothing_of_the_peers() -> None:
    log, first, second = await opened(), Standing(0), Standing(0)
    async with working(log, first, member="a") as stopping:
        async with working(log, second, member="b", drain_s=0.0):
            await until(lambda: len(log._group("w").members) == 2)
            await log.publish(*[reward(n, f"g{n}") for n in range(40)])
            await until(lambda: (first.worked | second.worked).total() == 16)
            mine = set(first.worked)
            stopping.set()
        await turns()
        first.through.set()
    assert set(first.worked) == mine and await ledger(log) == {f"g{n}-{n}": 1 for n in mine}
    third = Worker()
    async with working(log, third, member="c"):
        await until_committed(log, "w", "rewards")
    assert set(third.worked) == set(range(40)) - mine


async def test_a_stage_that_stops_leaves_once_its_partitions_have_settled() -> None:
    """They move when its last task ends: until then that cannot be committed."""
    log, worker = await opened(), Standing(0)
    steered = Steered(log)
    await log.publish(reward(0))
    async with working(steered, worker) as stopping:
        await until(lambda: worker.worked.total() == 1)
        stopping.set()
        member = steered.member
        assert member is not None
        member.halt()
        worker.through.set()
        await turns()
        member.receive(set(member.units()))
    assert (await log.committed("w"))[PLACE] == 1


async def test_a_task_that_ends_while_partitions_move_takes_no_place_back() -> None:
    """They were another member's meanwhile, who went further."""
    log, first, second = await opened(), Standing(40), Worker()
    slow = Slow(log)
    await log.publish(*[reward(n, f"g{n}") for n in range(40)])
    async with working(slow, first, member="a", max_in_flight=100, drain_s=0.0):
        await until_committed(log, "w", "rewards")
        await log.publish(*[reward(n, f"g{n - 40}") for n in range(40, 80)])
        await until(lambda: first.worked.total() == 80)
        slow.held = True
        await slow.waiting.wait()
        async with working(log, second, member="b"):
            await until(lambda: second.worked.total() > 5)
            await log.publish(*[reward(n, f"g{n - 80}") for n in range(80, 120)])
            await until(lambda: max(second.worked) >= 80)
        before = await log.committed("w")
        first.through.set()
        await turns()
        assert {place: offset for place, offset in (await log.committed("w")).items() if offset < before[place]} == {}
        slow.held = False
        slow.through.set()
        await until_committed(log, "w", "rewards")
    assert first.worked.keys() | second.worked.keys() == set(range(120))


async def test_tasks_of_partitions_that_are_lost_are_cancelled() -> None:
    """The new owner starts them again; those of partitions that stay go on."""
    log, second = await opened(), Worker()
    running, cancelled = set[int](), set[int]()

    async def stands_still(delivered: Delivered) -> Outcome:
        number = int(delivered.record().score)  # type: ignore[attr-defined]
        running.add(number)
        try:
            await anyio.sleep_forever()
        finally:
            running.discard(number)
            cancelled.add(number)
        raise AssertionError("unreachable")

    await log.publish(*[reward(n, f"g{n}") for n in range(40)])
    how: dict[str, Any] = {"group": "w", "max_in_flight": 40, "drain_s": 0.0}
    async with running_stage(run_work, log, stands_still, member="a", **how):
        await until(lambda: len(running) == 40)
        async with working(log, second, member="b"):
            await until(lambda: bool(cancelled) and second.worked.keys() == cancelled)
            assert running == set(range(40)) - cancelled and running


async def deferred(log: MemoryLog, number: int, due_s: float) -> None:
    """A reward in the shortest tier."""
    sealed = seal(reward(number))
    first = Delivered(Position("rewards", 0, number), sealed.key, sealed.value, sealed.headers, 0)
    later = retries.defer(first, "w", 10.0, "not yet", "r")
    await log.append(replace(later, headers={**later.headers, "due": str(int(due_s * 1000)).encode()}))


async def test_messages_that_rest_together_are_all_handled_when_they_are_due() -> None:
    """One poll gives both of a tier's partition, and neither is due: the place to go on is the first one's."""
    log, worker = await opened(), Worker()
    due_s = time.time() + 0.3
    await deferred(log, 0, due_s)
    await deferred(log, 1, due_s)
    async with working(log, worker):
        await until(lambda: worker.worked.total() == 2)
    assert worker.worked == Counter(range(2))


class SetBack:
    """A clock that is set back by an hour once it was looked at."""

    def __init__(self) -> None:
        self.looks = 0

    def time(self) -> float:
        self.looks += 1
        return time.time() - (3600.0 if self.looks > 1 else 0.0)


async def test_a_message_rests_once_whatever_the_clock_says_then(monkeypatch: pytest.MonkeyPatch) -> None:
    log, worker = await opened(), Worker()
    await deferred(log, 0, time.time() + 0.1)
    monkeypatch.setattr(retries, "time", SetBack())
    async with working(log, worker):
        await until(lambda: worker.worked.total() == 1)
    assert worker.worked == {0: 1}


class Unsure(Steered):
    """The first commit of a place fails: without an answer, or because partitions move just then."""

    def __init__(self, log: MemoryLog, error: LogError) -> None:
        super().__init__(log)
        self.error = error

    def steer(self, member: MemoryMember) -> None:
        commit = member.commit

        async def first(commits: Mapping[TopicPartition, Committed]) -> None:
            member.commit = commit  # type: ignore[method-assign]
            if isinstance(self.error, FencedError):
                member.halt()
                member.receive(set(member.units()))
            raise self.error

        member.commit = first  # type: ignore[method-assign]


@pytest.mark.parametrize("error", [LogUnavailable("no answer"), FencedError("they move")], ids=repr)
async def test_a_place_whose_commit_failed_is_committed_though_nothing_else_happens(error: LogError) -> None:
    log, worker = await opened(), Worker()
    await log.publish(reward(0))
    async with working(Unsure(log, error), worker):
        await until_committed(log, "w", "rewards")
    assert worker.worked == {0: 1}


class Away(Steered):
    """A broker that is away when the first records are written."""

    tries = 0

    async def append(self, *messages: Message, deadline_s: float = 30.0) -> None:
        self.tries += 1
        if self.tries == 1:
            raise LogUnavailable("not acknowledged")
        await self.log.append(*messages, deadline_s=deadline_s)


async def test_records_that_were_not_acknowledged_are_written_again() -> None:
    log, worker = await opened(), Worker()
    await log.publish(reward(0))
    async with working(Away(log), worker):
        await until_committed(log, "w", "rewards")
    assert await ledger(log) == {"g-0": 1} and worker.worked == {0: 1}


async def test_between_two_attempts_to_write_there_is_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "RETRY_S", 3600.0)
    log, worker = await opened(), Worker()
    away = Away(log)
    await log.publish(reward(0))
    async with working(away, worker, drain_s=0.0):
        await until(lambda: away.tries > 0)
        await turns()
        assert away.tries == 1


async def test_what_expired_unread_is_reported_and_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    log, worker = await opened(), Worker()
    await log.publish(reward(0))
    async with working(log, worker):
        await until_committed(log, "w", "rewards")
    await log.publish(*[reward(n) for n in range(1, 5)])
    partition = log.partitions("rewards")[PLACE.partition]
    partition.trim(2, 1 << 30, floor=partition.end)
    async with working(log, worker):
        await until_committed(log, "w", "rewards")
    assert worker.worked == Counter([0, 3, 4])
    assert "2 messages expired unread" in caplog.text


class FirstUnacknowledged(Steered):
    """What follows from the first message is acknowledged when the test says so."""

    def __init__(self, log: MemoryLog) -> None:
        super().__init__(log)
        self.waiting, self.through = anyio.Event(), anyio.Event()

    async def append(self, *messages: Any, **how: Any) -> None:
        if not self.waiting.is_set():
            self.waiting.set()
            await self.through.wait()
        await self.log.append(*messages, **how)


async def test_a_message_is_open_until_what_follows_from_it_is_acknowledged() -> None:
    log, worker = await opened(), Worker()
    steered = FirstUnacknowledged(log)
    await log.publish(reward(0), reward(1))
    async with working(steered, worker):
        assert (await until(lambda: log.committed("w")))[PLACE] == 0
        steered.through.set()
        await until_committed(log, "w", "rewards")
    assert await ledger(log) == {"g-0": 1, "g-1": 1}
