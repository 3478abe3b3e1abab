"""`run_transform` under one unlucky order of events each: what a mutation breaks, and random orders rarely meet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from kat_stream.errors import LogUnavailable
from kat_stream.log import Committed, Delivered, MemoryLog, Message, Outcome, TopicPartition
from kat_stream.log.memory_group import MemoryMember
from tests.contract.log_records import SIZE, GroupJoin, reward, until_committed
from tests.unit.stage_kit import (
    PLACE,
    Each,
    Steered,
    Worker,
    ledger,
    no_pauses,
    opened,
    transforming,
    working,
)
from tests.waiting import until
from topics import topic_named

__all__ = ["no_pauses"]
pytestmark = pytest.mark.anyio


def throws_away(member: MemoryMember) -> None:
    """Its first poll gives none of what it took, because partitions move meanwhile: the reader stands beyond that."""
    poll = member.poll

    async def first(**how: Any) -> list[Delivered]:
        member.poll = poll  # type: ignore[method-assign]
        assert await poll(**how)
        beyond = dict(member._positions)
        member.halt()
        member.receive(set(member.units()))
        member._positions.update(beyond)
        return []

    member.poll = first  # type: ignore[method-assign]


class Moving(Steered):
    def steer(self, member: MemoryMember) -> None:
        throws_away(member)


@pytest.mark.parametrize("stage", [working, transforming])
async def test_what_a_poll_threw_away_as_partitions_moved_is_no_marker(stage: Callable[..., Any]) -> None:
    log, worker = await opened(), Worker()
    await log.publish(*[reward(n) for n in range(4)])
    handler = worker if stage is working else Each(worker)
    async with stage(Moving(log), handler):
        await until_committed(log, "w" if stage is working else "t", "rewards")
    assert worker.worked == Counter(range(4))
    assert await ledger(log) == Counter(f"g-{n}" for n in range(4))


class Broken(Steered):
    """The first transaction does not go through, and says so."""

    def __init__(self, log: MemoryLog) -> None:
        super().__init__(log)
        self.failed = False

    async def writer(self, writer_id: str, *, group: str) -> Any:
        writer = await self.log.writer(writer_id, group=group)
        commit = writer.commit

        async def fails_once(messages: Sequence[Message], commits: Mapping[TopicPartition, Committed]) -> None:
            if not self.failed:
                self.failed = True
                raise LogUnavailable("no answer")
            await commit(messages, commits)

        writer.commit = fails_once  # type: ignore[method-assign]
        return writer


async def test_a_batch_that_was_not_written_is_read_again_by_the_same_member() -> None:
    log, handler = await opened(), GroupJoin()
    await log.publish(*[reward(n) for n in range(SIZE)])
    async with transforming(Broken(log), handler, remember="ledger"):
        await until_committed(log, "t", "rewards")
    assert await ledger(log) == {"g": 1}


class Dies(Exception):
    """The process is gone."""


class LastCall(Steered):
    """The process dies as soon as its first transaction is done."""

    async def writer(self, writer_id: str, *, group: str) -> Any:
        writer = await self.log.writer(writer_id, group=group)
        commit = writer.commit

        async def dies(messages: Sequence[Message], commits: Mapping[TopicPartition, Committed]) -> None:
            await commit(messages, commits)
            raise Dies

        writer.commit = dies  # type: ignore[method-assign]
        return writer


async def test_what_is_written_and_the_place_are_one_transaction() -> None:
    log, worker = await opened(), Worker()
    await log.publish(*[reward(n) for n in range(4)])
    with pytest.raises(ExceptionGroup) as died:
        async with transforming(LastCall(log), Each(worker)):
            await anyio.sleep_forever()
    assert died.group_contains(Dies)
    async with transforming(log, Each(worker)):
        await until_committed(log, "t", "rewards")
    assert await ledger(log) == Counter(f"g-{n}" for n in range(4))


async def test_a_handler_is_told_of_partitions_that_it_lost() -> None:
    log, first, second = await opened(), GroupJoin(), GroupJoin()
    async with transforming(log, first, member="a"):
        await until(lambda: bool(first.open))
        async with transforming(log, second, member="b"):
            await until(lambda: second.open and not first.open.keys() & second.open.keys(), "the hand-over")
            assert first.open.keys() | second.open.keys() == set(range(topic_named("rewards").partitions))


class StandsStill(GroupJoin):
    """Handles the last message of a group when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting, self.through = anyio.Event(), anyio.Event()

    async def handle(self, delivered: Delivered) -> Outcome:
        if delivered.position.offset == SIZE - 1:
            self.waiting.set()
            await self.through.wait()
        return await super().handle(delivered)


async def test_an_owner_that_stood_still_cannot_write_once_the_next_has_opened() -> None:
    log, late, owner = await opened(), StandsStill(), GroupJoin()
    zombie = Steered(log)
    await log.publish(*[reward(n) for n in range(SIZE)])
    async with transforming(zombie, late, member="a", remember="ledger") as stop_zombie:
        await late.waiting.wait()
        assert zombie.member is not None
        await zombie.member.leave()
        async with transforming(log, owner, member="b", remember="ledger"):
            await until_committed(log, "t", "rewards")
            stop_zombie.set()
            late.through.set()
            await until(lambda: not late.open)
    assert await ledger(log) == {"g": 1}
    assert (await log.committed("t"))[PLACE] == SIZE


class LastWord(Steered):
    """Just before its first writer opens, the owner before it says its last word."""

    def __init__(self, log: MemoryLog, late: StandsStill) -> None:
        super().__init__(log)
        self.late = late

    async def writer(self, writer_id: str, *, group: str) -> Any:
        if not self.late.through.is_set():
            self.late.through.set()
            await until(self.told)
        return await self.log.writer(writer_id, group=group)

    async def told(self) -> bool:
        return (await self.log.committed("t")).get(PLACE) == SIZE


@pytest.mark.parametrize("remember", ["ledger", None])
async def test_what_an_owner_wrote_while_the_next_opened_is_known(remember: str | None) -> None:
    """Its place, and its words: the group comes once more, and is told of once."""
    log, late, worker = await opened(), StandsStill(), Worker()
    owner = GroupJoin() if remember else Each(worker)
    zombie = Steered(log)
    await log.publish(*[reward(n) for n in range(SIZE)])
    async with transforming(zombie, late, member="a", remember=remember) as stop_zombie:
        await late.waiting.wait()
        assert zombie.member is not None
        await zombie.member.leave()
        stop_zombie.set()
        async with transforming(LastWord(log, late), owner, member="b", remember=remember):
            await late.through.wait()
            await log.publish(*[reward(n) for n in range(SIZE if remember else 1)])
            await until_committed(log, "t", "rewards")
    assert worker.worked == ({} if remember else {0: 1})
    assert await ledger(log) == ({"g": 1} if remember else {"g": 1, "g-0": 1})
