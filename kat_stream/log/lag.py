"""How far groups are behind, in messages and in seconds.

Invariant: reading lag joins no group and moves no offset. What is finished beyond the low-watermark is not lag.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from kat_stream.errors import DeadlineExceeded
from kat_stream.log.base import Committed, Group, Log, TopicPartition
from kat_stream.log.tracker import decode_runs

AGE_S = 10.0
"""How long to look for the oldest unread messages of a group."""


@dataclass(frozen=True, slots=True)
class PartitionLag:
    """What is unfinished in one partition; there is no such thing without an unfinished offset."""

    partition: int
    first: int
    """The first unfinished offset."""
    messages: int
    seconds: float | None = None
    """Age of the message there; None if it was not asked for, 0 if only transaction markers are left."""


@dataclass(frozen=True, slots=True)
class Lag:
    """What one group has still to finish in one topic."""

    group: str
    topic: str
    partitions: tuple[PartitionLag, ...] = ()
    """Those with anything unfinished."""
    aged: bool = False
    """Whether ages were asked for."""

    @property
    def messages(self) -> int:
        return sum(partition.messages for partition in self.partitions)

    @property
    def seconds(self) -> float | None:
        """Age of the oldest unfinished message; None if it was not asked for, 0 without any."""
        return max((partition.seconds or 0.0 for partition in self.partitions), default=0.0) if self.aged else None


async def lags(log: Log, *, ages: bool = False) -> list[Lag]:
    """Lag of every group in every topic that it has read or owns. `ages` reads one message a lagging partition."""
    found = [lag for group in await log.groups() for lag in await _lags_of(log, group)]
    return [await _aged(log, lag) for lag in found] if ages else found


async def lag_behind(log: Log, group: str, topic: str, places: Mapping[int, int]) -> Lag:
    """Lag of a reader that keeps its places elsewhere: partition -> next offset. Partitions left out: from the start.

    Such places do not pass transaction markers: where only these are left, nothing is.
    """
    commits = {TopicPartition(topic, number): Committed(offset) for number, offset in places.items()}
    lag = await _aged(log, await _lag_in(log, group, topic, commits))
    return replace(lag, partitions=tuple(one for one in lag.partitions if one.seconds))


async def _lags_of(log: Log, group: Group) -> list[Lag]:
    commits = await log.commits(group.name)
    owned = {partition for partitions in group.members.values() for partition in partitions}
    topics = sorted({partition.topic for partition in owned | commits.keys()} & (await log.topics()).keys())
    return [await _lag_in(log, group.name, topic, commits) for topic in topics]


async def _lag_in(log: Log, group: str, topic: str, commits: Mapping[TopicPartition, Committed]) -> Lag:
    begins, ends = await log.beginning_offsets(topic), await log.end_offsets(topic)
    unfinished = []
    for number, end in sorted(ends.items()):
        place = commits.get(TopicPartition(topic, number), Committed(begins[number]))
        first = max(place.offset, begins[number])
        if first < end:
            finished = sum(stop - start for start, stop in decode_runs(place))
            unfinished.append(PartitionLag(number, first, max(0, end - first - finished)))
    return Lag(group, topic, tuple(unfinished))


async def _aged(log: Log, lag: Lag) -> Lag:
    first = await _first_timestamps(log, lag) if lag.partitions else {}
    now_ms = time.time() * 1000
    ages = {number: max(0.001, (now_ms - timestamp_ms) / 1000) for number, timestamp_ms in first.items()}
    partitions = [replace(one, seconds=ages.get(one.partition, 0.0)) for one in lag.partitions]
    return replace(lag, partitions=tuple(partitions), aged=True)


async def _first_timestamps(log: Log, lag: Lag) -> dict[int, int]:
    """Partition -> milliseconds; without partitions in which only markers are left, or for which time ran out."""
    numbers = [partition.partition for partition in lag.partitions]
    start = {(lag.topic, partition.partition): partition.first for partition in lag.partitions}
    found: dict[int, int] = {}
    async with log.follow([lag.topic], start=start, partitions=numbers) as follower:
        try:
            async for delivered in follower.catch_up(AGE_S):
                found.setdefault(delivered.position.partition, delivered.timestamp_ms)
                if len(found) == len(numbers):
                    break
        except DeadlineExceeded:
            return found
    return found
