"""How far groups are behind, in messages and in seconds.

Invariant: reading lag joins no group and moves no offset. What is finished beyond the low-watermark is not lag.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

from kat_stream.errors import DeadlineExceeded
from kat_stream.log.base import Committed, Group, Log, TopicPartition
from kat_stream.log.tracker import decode_runs

AGE_S = 10.0
"""How long to look for the oldest unread messages of a group."""


@dataclass(frozen=True, slots=True)
class Lag:
    """What one group has still to finish in one topic."""

    group: str
    topic: str
    messages: int
    oldest: tuple[tuple[TopicPartition, int], ...] = ()
    """The first unfinished offset of each partition that has any."""
    seconds: float | None = None
    """Age of the oldest unfinished message; None if it was not asked for, 0 without any."""


async def lags(log: Log, *, ages: bool = False) -> list[Lag]:
    """Lag of every group in every topic that it has read or owns. `ages` reads one message a lagging partition."""
    found = [lag for group in await log.groups() for lag in await _lags_of(log, group)]
    return [await _aged(log, lag) for lag in found] if ages else found


async def _lags_of(log: Log, group: Group) -> list[Lag]:
    commits = await log.commits(group.name)
    owned = {partition for partitions in group.members.values() for partition in partitions}
    topics = sorted({partition.topic for partition in owned | commits.keys()} & (await log.topics()).keys())
    return [await _lag_in(log, group.name, topic, commits) for topic in topics]


async def _lag_in(log: Log, group: str, topic: str, commits: dict[TopicPartition, Committed]) -> Lag:
    begins, ends = await log.beginning_offsets(topic), await log.end_offsets(topic)
    messages, oldest = 0, []
    for number, end in ends.items():
        partition = TopicPartition(topic, number)
        place = commits.get(partition, Committed(begins[number]))
        first = max(place.offset, begins[number])
        if first < end:
            finished = sum(stop - start for start, stop in decode_runs(place))
            messages += max(0, end - first - finished)
            oldest.append((partition, first))
    return Lag(group, topic, messages, tuple(oldest))


async def _aged(log: Log, lag: Lag) -> Lag:
    waiting = dict(lag.oldest)
    timestamps = await _first_timestamps(log, lag.topic, waiting) if waiting else []
    return replace(lag, seconds=max(0.0, time.time() - min(timestamps) / 1000) if timestamps else 0.0)


async def _first_timestamps(log: Log, topic: str, waiting: dict[TopicPartition, int]) -> Iterable[int]:
    """Milliseconds; fewer than partitions if only transaction markers are left there or time runs out."""
    numbers = [partition.partition for partition in waiting]
    found: dict[int, int] = {}
    async with log.follow([topic], start=waiting, partitions=numbers) as follower:  # type: ignore[arg-type]
        try:
            async for delivered in follower.catch_up(AGE_S):
                found.setdefault(delivered.position.partition, delivered.timestamp_ms)
                if len(found) == len(numbers):
                    break
        except DeadlineExceeded:
            return found.values()
    return found.values()
