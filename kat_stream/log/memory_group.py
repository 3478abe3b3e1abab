"""Consumer groups of the in-memory log: membership, rebalance, committed places.

Invariant: rebalances of a group run one after the other; while one runs, every member was told (`on_revoked`) and no
member polls anything. As on Kafka the protocol is eager: all partitions are revoked, then all are assigned.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING

import anyio

from kat_stream.errors import FencedError, LogError
from kat_stream.log.assignment import assign
from kat_stream.log.base import Committed, Delivered, Message, OnRevoked, TopicPartition

if TYPE_CHECKING:
    from kat_stream.log.memory import MemoryLog

REBALANCE_S = 60.0
"""A member that needs longer to give up its partitions loses them anyway, as on Kafka."""


class MemoryGroup:
    """One group: its members and its committed places."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.members: list[MemoryMember] = []
        self.committed: dict[TopicPartition, Committed] = {}
        self.writers: dict[str, MemoryWriter] = {}
        self._lock = asyncio.Lock()
        self._leaving: set[asyncio.Future[None]] = set()
        """Of members that were cancelled while they joined: the lock puts it behind the joining."""

    async def add(self, member: MemoryMember) -> None:
        if any(other.topics != member.topics for other in self.members):
            raise LogError(f"group {self.name}: all members read the same topics")
        joining = asyncio.ensure_future(self._change(add=member))
        try:
            await asyncio.shield(joining)
        except BaseException:  # cancelled, say: the change goes on to its end, and then nobody would poll what it got
            leaving = asyncio.ensure_future(self.remove(member))
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)
            raise

    async def remove(self, member: MemoryMember) -> None:
        await _whole(self._change(remove=member))

    async def _change(self, add: MemoryMember | None = None, remove: MemoryMember | None = None) -> None:
        async with self._lock:
            if remove is not None:
                if remove not in self.members:
                    return
                self.members.remove(remove)
            await self._revoke()
            self.members += [add] if add else []
            owned = {member: member.units() for member in self.members}
            units = {unit for member in self.members for unit in member.all_units()}
            for member, mine in assign(units, owned).items():
                member.receive(mine)

    async def _revoke(self) -> None:
        for member in self.members:
            member.halt()
        with anyio.move_on_after(REBALANCE_S):
            async with anyio.create_task_group() as tasks:
                for member in self.members:
                    tasks.start_soon(member.on_revoked, member.owned)

    def needs(self, place: TopicPartition, otherwise: int) -> int:
        """The oldest offset that this group has still to read."""
        if place in self.committed:
            return self.committed[place].offset
        return 0 if any(place.topic in member.topics for member in self.members) else otherwise


async def _whole(change: Coroutine[None, None, None]) -> None:
    """Run a membership change to its end even if the caller is cancelled."""
    await asyncio.shield(asyncio.ensure_future(change))


class MemoryMember:
    """The `Member` protocol in one process."""

    def __init__(
        self,
        log: MemoryLog,
        group: MemoryGroup,
        name: str,
        topics: Sequence[str],
        on_revoked: OnRevoked,
        together: bool,
    ) -> None:
        self.epoch = 0
        self.owned: frozenset[TopicPartition] = frozenset()
        self.name = name
        self.topics = tuple(topics)
        self.on_revoked = on_revoked
        self._log = log
        self._group = group
        self._together = together
        self._moving = False
        self._positions: dict[TopicPartition, int] = {}
        self._paused: set[TopicPartition] = set()

    @property
    def assigned(self) -> frozenset[TopicPartition] | None:
        return None if self._moving else self.owned

    def all_units(self) -> set[tuple[TopicPartition, ...]]:
        """What is assigned as one: a partition, or a partition number of all topics."""
        partitions = [TopicPartition(t, p) for t in self.topics for p in range(self._log.count(t))]
        if not self._together:
            return {(partition,) for partition in partitions}
        numbers = {partition.partition for partition in partitions}
        return {tuple(p for p in partitions if p.partition == number) for number in numbers}

    def units(self) -> list[tuple[TopicPartition, ...]]:
        return sorted(unit for unit in self.all_units() if self.owned.issuperset(unit))

    def halt(self) -> None:
        """Partitions move from now on: no poll returns anything."""
        self._moving = True
        self.epoch += 1
        self._log.wake()

    def receive(self, units: set[tuple[TopicPartition, ...]]) -> None:
        self.owned = frozenset(partition for unit in units for partition in unit)
        self._positions = {p: self._group.committed.get(p, Committed(0)).offset for p in self.owned}
        self._paused.clear()
        self._moving = False
        self.epoch += 1
        self._log.wake()

    async def poll(self, *, limit: int, timeout_s: float) -> list[Delivered]:
        epoch = self.epoch
        await self._log.wait_for(lambda: self.epoch != epoch or self._log.readable(self._active()), timeout_s)
        if self.epoch != epoch:
            return []
        positions = self._active()
        taken = self._log.take(positions, limit)
        self._positions.update(positions)
        return taken

    def _active(self) -> dict[TopicPartition, int]:
        if not self._paused:
            return self._positions
        return {partition: at for partition, at in self._positions.items() if partition not in self._paused}

    async def keep_alive(self) -> None:
        """A member of this process lives as long as the process."""

    def seek(self, partition: TopicPartition, offset: int) -> None:
        self._positions[partition] = offset

    def pause(self, partition: TopicPartition) -> None:
        self._paused.add(partition)

    def resume(self, partition: TopicPartition) -> None:
        self._paused.discard(partition)

    async def position(self, partition: TopicPartition) -> int | None:
        return self._positions.get(partition)

    async def commit(self, commits: Mapping[TopicPartition, Committed]) -> None:
        if self not in self._group.members or not self.owned.issuperset(commits):
            raise FencedError(f"group {self._group.name}: {self.name} does not own {sorted(commits)} any more")
        self._group.committed.update(commits)

    async def leave(self) -> None:
        if self in self._group.members:
            await self._group.remove(self)


class MemoryWriter:
    """The `Writer` protocol in one process: there is nothing between two statements, so a commit is atomic."""

    def __init__(self, log: MemoryLog, group: MemoryGroup, writer_id: str) -> None:
        self._log = log
        self._group = group
        self._id = writer_id
        group.writers[writer_id] = self

    async def commit(self, messages: Sequence[Message], commits: Mapping[TopicPartition, Committed]) -> None:
        if self._group.writers.get(self._id) is not self:
            raise FencedError(f"writer {self._id} was opened by another member")
        self._log.store(messages)
        self._group.committed.update(commits)

    async def close(self) -> None:
        if self._group.writers.get(self._id) is self:
            del self._group.writers[self._id]
