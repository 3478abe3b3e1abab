"""Small records and a joining handler for the log's tests, and waiting for what a stage writes and commits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from aiokafka.errors import KafkaError

from kat_stream.log import Delivered, Emit, Hold, Log, Outcome, Position, TopicPartition
from tests.waiting import until
from topics import LedgerEntry, Reward, partition_of

WAIT_S = 30.0
SIZE = 3
"""Rewards of a group in these tests."""


def reward(number: int, group: str = "g") -> Reward:
    return Reward(run="r", group_id=group, rollout_id=f"{group}-{number}", task_id="t", verifier="v", score=number)


def entry(group: str, rollout: str, reason: str = "") -> LedgerEntry:
    return LedgerEntry(run="r", group_id=group, rollout_id=rollout, state="packed", reason=reason)


def groups_on_one_partition(count: int) -> list[str]:
    """Group ids whose records share a partition."""
    names = [f"g{number}" for number in range(count * 40)]
    here = partition_of(reward(0, names[0]))
    return [name for name in names if partition_of(reward(0, name)) == here][:count]


async def nothing(partitions: frozenset[TopicPartition]) -> None:
    """A member without work in hand has nothing to hand over."""


async def everything(log: Log, *topics: str) -> list[Delivered]:
    async with log.follow(topics) as follower:
        return [delivered async for delivered in follower.catch_up(WAIT_S)]


async def until_written(log: Log, topic: str, count: int, deadline_s: float = 2 * WAIT_S) -> list[Delivered]:
    """The messages of a topic, once there are so many."""

    async def written() -> list[Delivered]:
        found = await everything(log, topic)
        return found if len(found) >= count else []

    return await until(written, f"{count} messages on {topic}", deadline_s)


async def committed_up_to_end(log: Log, group: str, *topics: str) -> bool:
    committed = await log.committed(group)
    ends = {(topic, number): end for topic in topics for number, end in (await log.end_offsets(topic)).items()}
    return all(committed.get(place, 0) == end for place, end in ends.items())  # type: ignore[call-overload]


async def until_committed(log: Log, group: str, *topics: str) -> None:
    """Until the group has finished all that these topics hold."""
    await until(lambda: committed_up_to_end(log, group, *topics), f"{group} at the end of {topics}", 2 * WAIT_S)


class GroupJoin:
    """Holds rewards until a group of SIZE is complete, then emits one ledger entry for it; knows what it emitted."""

    def __init__(self, before: Callable[[Reward], None] = lambda record: None) -> None:
        self.before = before
        self.handled: list[float] = []
        self.open: dict[int, dict[str, list[Position]]] = {}
        self.emitted: dict[int, set[str]] = {}

    def assigned(self, partition: int, replay: Sequence[Delivered]) -> None:
        assert partition not in self.open
        self.open[partition] = {}
        self.emitted[partition] = {d.record().group_id for d in replay}  # type: ignore[attr-defined]

    def revoked(self, partition: int) -> None:
        del self.open[partition], self.emitted[partition]

    async def handle(self, delivered: Delivered) -> Outcome:
        record, partition = delivered.record(), delivered.position.partition
        assert isinstance(record, Reward)
        self.before(record)
        self.handled.append(record.score)
        if record.group_id in self.emitted[partition]:
            return Emit()
        held = self.open[partition].setdefault(record.group_id, [])
        held.append(delivered.position)
        if len(held) < SIZE:
            return Hold()
        del self.open[partition][record.group_id]
        self.emitted[partition].add(record.group_id)
        return Emit(entry(record.group_id, record.group_id), done=held[:-1])


def forgive_cut_off_commits() -> None:
    """Where a broker dies, aiokafka leaves the error of a commit that was cut off at its deadline to nobody."""
    loop = asyncio.get_running_loop()
    before = loop.get_exception_handler()

    def handle(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if isinstance(context.get("exception"), KafkaError):
            return
        if before is None:
            loop.default_exception_handler(context)
        else:
            before(loop, context)

    loop.set_exception_handler(handle)
