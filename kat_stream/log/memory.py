"""The log in one process: the same semantics as on Kafka, nothing on disk, no thread.

Owns partitions, retention and waiting readers; groups are in memory_group.py. Invariant: records cross as bytes, so
that nothing is shared by reference; retention never removes what a group or a follower has still to read.
All callers live on one event loop.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from heapq import merge
from itertools import islice
from weakref import WeakSet

import anyio
import anyio.lowlevel

from kat_stream.errors import LogError
from kat_stream.log.base import (
    Committed,
    Delivered,
    Follower,
    Group,
    Member,
    Message,
    OnRevoked,
    Position,
    Start,
    TopicPartition,
    Writer,
)
from kat_stream.log.follower import BaseFollower
from kat_stream.log.memory_group import MemoryGroup, MemoryMember, MemoryWriter
from kat_stream.log.message import check, seal
from topics.catalogue import Topic
from topics.record import Record

RETAIN_BYTES = 128 << 20
RETAIN_MESSAGES = 1_000_000
FETCH = 500
"""Messages a follower takes at once."""
SLACK = 1.25
"""Trim once a partition is this much over its limit, or over what the last trim could not drop: trimming is rare."""


class _Partition:
    """Messages of one partition, oldest first; offsets have gaps where a compacted topic dropped older values."""

    def __init__(self, topic: Topic, number: int) -> None:
        self.place = TopicPartition(topic.name, number)
        self.begin = 0
        self.end = 0
        self.size = 0
        self.trimmed = (0, 0)
        """Messages and bytes that the last trim left."""
        self._compact = topic.cleanup == "compact"
        self._messages: list[Delivered] = []

    def __len__(self) -> int:
        return len(self._messages)

    def append(self, message: Message, now_ms: int) -> None:
        position = Position(*self.place, self.end)
        self._messages.append(Delivered(position, message.key, message.value, dict(message.headers), now_ms))
        self.end += 1
        self.size += len(message.value)

    def read(self, start: int, limit: int) -> list[Delivered]:
        """LogError if retention removed what lies at `start`, or the partition never came that far."""
        if not self.begin <= start <= self.end:
            raise LogError(f"{self.place}: no offset {start}, there are {self.begin} to {self.end}")
        index = bisect_left(self._messages, start, key=_offset)
        return self._messages[index : index + limit]

    def trim(self, most_messages: int, most_bytes: int, floor: int) -> None:
        """Drop the oldest, or of a compacted topic what a newer message replaces, but nothing from `floor` on."""
        if self._compact:
            newest = {message.key: _offset(message) for message in self._messages}
            kept = [m for m in self._messages if _offset(m) >= floor or newest[m.key] == _offset(m)]
        else:
            kept = self._after_dropping(most_messages, most_bytes, floor)
        self._messages = kept
        self.size = sum(len(message.value) for message in kept)
        self.trimmed = (len(kept), self.size)

    def _after_dropping(self, most_messages: int, most_bytes: int, floor: int) -> list[Delivered]:
        first, count, size = 0, len(self._messages), self.size
        while count > 0 and (count > most_messages or size > most_bytes) and _offset(self._messages[first]) < floor:
            size -= len(self._messages[first].value)
            first, count = first + 1, count - 1
            self.begin = self.end if count == 0 else _offset(self._messages[first])
        return self._messages[first:]


def _timestamp(message: Delivered) -> int:
    return message.timestamp_ms


def _offset(message: Delivered) -> int:
    return message.position.offset


class MemoryLog:
    """The `Log` protocol in one process. Limits are per topic; both are soft where a reader is slow."""

    def __init__(self, *, retain_bytes: int = RETAIN_BYTES, retain_messages: int = RETAIN_MESSAGES) -> None:
        self._retain_bytes = retain_bytes
        self._retain_messages = retain_messages
        self._topics: dict[str, list[_Partition]] = {}
        self._groups: dict[str, MemoryGroup] = {}
        self._followers: WeakSet[MemoryFollower] = WeakSet()
        self._waiting: set[asyncio.Event] = set()

    async def start(self) -> None:
        """There is nothing to connect to."""

    async def close(self) -> None:
        self._followers.clear()
        self.wake()

    async def apply_topics(self, topics: Iterable[Topic]) -> list[str]:
        created = []
        for topic in topics:
            there = self._topics.get(topic.name)
            if there is None:
                self._topics[topic.name] = [_Partition(topic, number) for number in range(topic.partitions)]
                created.append(topic.name)
            elif len(there) != topic.partitions:
                raise LogError(f"topic {topic.name} has {len(there)} partitions, the catalogue says {topic.partitions}")
        return created

    async def publish(self, *records: Record, deadline_s: float = 30.0) -> None:
        self.store([seal(record) for record in records])
        await asyncio.sleep(0)  # as on Kafka, a writer in a loop gives readers a turn

    async def append(self, *messages: Message, deadline_s: float = 30.0) -> None:
        for message in messages:
            check(message)
        self.store(messages)
        await asyncio.sleep(0)

    def follow(
        self,
        topics: Sequence[str],
        *,
        start: Start = "earliest",
        partitions: Sequence[int] | None = None,
        poll_s: float = 0.2,
    ) -> Follower:
        return MemoryFollower(self, topics, start, partitions, poll_s)

    async def end_offsets(self, topic: str) -> dict[int, int]:
        return {number: partition.end for number, partition in enumerate(self.partitions(topic))}

    async def high_watermarks(self, topic: str) -> dict[int, int]:
        return await self.end_offsets(topic)

    async def beginning_offsets(self, topic: str) -> dict[int, int]:
        return {number: partition.begin for number, partition in enumerate(self.partitions(topic))}

    async def committed(self, group: str) -> dict[TopicPartition, int]:
        return {partition: place.offset for partition, place in (await self.commits(group)).items()}

    async def commits(self, group: str) -> dict[TopicPartition, Committed]:
        return dict(self._groups[group].committed) if group in self._groups else {}

    async def topics(self) -> dict[str, int]:
        return {name: len(partitions) for name, partitions in self._topics.items()}

    async def groups(self) -> list[Group]:
        return [_described(group) for group in self._groups.values()]

    async def join(
        self, topics: Sequence[str], *, group: str, member: str, on_revoked: OnRevoked, together: bool = False
    ) -> Member:
        found = self._group(group)
        joined = MemoryMember(self, found, member, topics, on_revoked, together)
        await found.add(joined)
        return joined

    async def writer(self, writer_id: str, *, group: str) -> Writer:
        return MemoryWriter(self, self._group(group), writer_id)

    def _group(self, name: str) -> MemoryGroup:
        return self._groups.setdefault(name, MemoryGroup(name))

    # What groups and followers need.

    def partitions(self, topic: str) -> list[_Partition]:
        """LogError if the topic does not exist."""
        try:
            return self._topics[topic]
        except KeyError:
            raise LogError(f"topic {topic} does not exist: apply the topics first") from None

    def count(self, topic: str) -> int:
        return len(self.partitions(topic))

    def store(self, messages: Sequence[Message]) -> None:
        """Append all or, if a topic is missing, none."""
        topics = [self.partitions(message.topic) for message in messages]
        targets = [there[message.partition % len(there)] for there, message in zip(topics, messages, strict=True)]
        now_ms = time.time_ns() // 1_000_000
        for message, partition in zip(messages, targets, strict=True):
            partition.append(message, now_ms)
            self._maybe_trim(partition)
        self.wake()

    def readable(self, positions: Mapping[TopicPartition, int]) -> bool:
        return any(self._topics[p.topic][p.partition].end > at for p, at in positions.items())

    def take(self, positions: MutableMapping[TopicPartition, int], limit: int) -> list[Delivered]:
        """Up to `limit` messages, the oldest over all partitions first, so that none starves; moves the positions."""
        behind = [place for place, at in positions.items() if self._topics[place.topic][place.partition].end > at]
        waiting = {place: self._topics[place.topic][place.partition].read(positions[place], limit) for place in behind}
        for place, messages in waiting.items():
            if not messages:  # compaction has dropped all up to the end
                positions[place] = self._topics[place.topic][place.partition].end
        taken = list(islice(merge(*waiting.values(), key=_timestamp), limit))
        for message in taken:
            positions[message.position.topic_partition] = message.position.offset + 1
        return taken

    async def wait_for(self, ready: Callable[[], bool], timeout_s: float) -> None:
        """Until `ready`, at most `timeout_s`; always gives other tasks a turn."""
        event = asyncio.Event()
        self._waiting.add(event)
        try:
            await anyio.lowlevel.checkpoint()
            with anyio.move_on_after(timeout_s):
                while not ready():
                    await event.wait()
                    event.clear()
        finally:
            self._waiting.discard(event)

    def wake(self) -> None:
        for event in self._waiting:
            event.set()

    def watch(self, follower: MemoryFollower) -> None:
        self._followers.add(follower)

    def unwatch(self, follower: MemoryFollower) -> None:
        self._followers.discard(follower)

    def _maybe_trim(self, partition: _Partition) -> None:
        count = len(self._topics[partition.place.topic])
        most_messages, most_bytes = self._retain_messages // count, self._retain_bytes // count
        left_messages, left_bytes = partition.trimmed
        too_many = len(partition) > SLACK * max(most_messages, left_messages)
        if too_many or partition.size > SLACK * max(most_bytes, left_bytes):
            partition.trim(most_messages, most_bytes, self._floor(partition))

    def _floor(self, partition: _Partition) -> int:
        """The oldest offset that somebody has still to read."""
        place, end = partition.place, partition.end
        followers = (follower.needs().get(place, end) for follower in self._followers)
        groups = (group.needs(place, end) for group in self._groups.values())
        return min((end, *followers, *groups))


class MemoryFollower(BaseFollower):
    """The `Follower` protocol in one process."""

    def __init__(
        self, log: MemoryLog, topics: Sequence[str], start: Start, partitions: Sequence[int] | None, poll_s: float
    ) -> None:
        super().__init__(poll_s)
        self._log = log
        self._topics = topics
        self._start = start
        self._numbers = partitions
        self._positions: dict[TopicPartition, int] = {}

    async def open(self) -> None:
        if self._positions:
            return
        for topic in self._topics:
            numbers = range(self._log.count(topic)) if self._numbers is None else self._numbers
            for number in numbers:
                partition = self._log.partitions(topic)[number]
                start = _start_of(self._start, partition)
                partition.read(start, 0)
                self._positions[partition.place] = start
        self._log.watch(self)

    def needs(self) -> Mapping[TopicPartition, int]:
        return self._positions

    async def _fetch(self, timeout_s: float) -> list[Delivered]:
        await self.open()
        await self._log.wait_for(lambda: self._log.readable(self._positions), timeout_s)
        return self._log.take(self._positions, FETCH)

    async def _ends(self) -> dict[TopicPartition, int]:
        return {p: self._log.partitions(p.topic)[p.partition].end for p in self._positions}

    async def _reached(self, ends: dict[TopicPartition, int]) -> bool:
        return all(self._positions[partition] >= end for partition, end in ends.items())

    def _fetched(self) -> dict[TopicPartition, int]:
        return dict(self._positions)

    async def aclose(self) -> None:
        self._log.unwatch(self)


def _start_of(start: Start, partition: _Partition) -> int:
    if start == "earliest":
        return partition.begin
    if start == "latest":
        return partition.end
    return start.get(partition.place, partition.begin) if isinstance(start, Mapping) else partition.begin


def _described(group: MemoryGroup) -> Group:
    members = {member.name: tuple(sorted(member.owned)) for member in group.members}
    return Group(group.name, "Stable" if members else "Empty", members)
