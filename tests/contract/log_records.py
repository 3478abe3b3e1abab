"""Small records for the log's tests, and waiting for a condition with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable

import anyio

from kat_stream.log import Delivered, Log
from topics import LedgerEntry, Reward, partition_of

WAIT_S = 30.0


def reward(number: int, group: str = "g") -> Reward:
    return Reward(run="r", group_id=group, rollout_id=f"{group}-{number}", task_id="t", verifier="v", score=number)


def entry(group: str, rollout: str, reason: str = "") -> LedgerEntry:
    return LedgerEntry(run="r", group_id=group, rollout_id=rollout, state="packed", reason=reason)


def groups_on_one_partition(count: int) -> list[str]:
    """Group ids whose records share a partition."""
    names = [f"g{number}" for number in range(count * 40)]
    here = partition_of(reward(0, names[0]))
    return [name for name in names if partition_of(reward(0, name)) == here][:count]


async def everything(log: Log, *topics: str) -> list[Delivered]:
    async with log.follow(topics) as follower:
        return [delivered async for delivered in follower.catch_up(WAIT_S)]


async def eventually(condition: Callable[[], bool], what: str = "the condition") -> None:
    give_up = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < give_up, f"{what} did not come true within {WAIT_S} s"
        await anyio.sleep(0.01)


async def committed_up_to_end(log: Log, group: str, topic: str) -> bool:
    committed, ends = await log.committed(group), await log.end_offsets(topic)
    return all(committed.get((topic, number), 0) == end for number, end in ends.items())  # type: ignore[call-overload]
