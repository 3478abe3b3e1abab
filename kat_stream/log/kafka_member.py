"""A member of a consumer group on Kafka, with aiokafka's traps closed.

Invariant: a message is handed out only if the assignment did not change while it was fetched; a poll is never
cancelled; ownership comes from the callbacks, never from `assignment()` (research/kafka_real.md 1.7, 2.4).
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import aiokafka
from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener
from aiokafka.coordinator.assignors.range import RangePartitionAssignor
from aiokafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor
from aiokafka.errors import IllegalStateError
from aiokafka.structs import ConsumerRecord, OffsetAndMetadata

from kat_stream.errors import LogError
from kat_stream.log.base import Committed, Delivered, OnRevoked, Position, TopicPartition
from kat_stream.log.kafka_client import Broker, stopped, translated, whole

FETCH_BYTES = 1 << 16
"""A partition's share of what is fetched ahead. aiokafka hands out one partition's share to the end before the next
one's: a large share would let a group that came first wait behind hundreds of others. A larger message comes whole."""
JOIN_S = 60.0
COMMIT_S = 10.0
POSITION_S = 1.0
"""A position is known at once after a seek; it is not while partitions move."""
REBALANCE_TIMEOUT_MS = 60_000
"""How long the group waits for a member that hands over; aiokafka's default is the session timeout."""
MAX_POLL_INTERVAL_MS = 300_000


def delivered(broker: Broker, record: ConsumerRecord[Any, Any]) -> Delivered:
    """aiokafka's record as ours."""
    position = Position(record.topic.removeprefix(broker.prefix), record.partition, record.offset)
    return Delivered(position, record.key, record.value or b"", dict(record.headers), record.timestamp)


class KafkaMember:
    """The `Member` protocol."""

    def __init__(
        self, broker: Broker, group: str, name: str, topics: Sequence[str], on_revoked: OnRevoked, together: bool
    ) -> None:
        self.epoch = 0
        self.assigned: frozenset[TopicPartition] | None = None
        self._broker = broker
        self._group = group
        self._on_revoked = on_revoked
        self._failure: Exception | None = None
        self._consumer = AIOKafkaConsumer(
            **broker.options(),
            group_id=broker.named(group),
            client_id=name,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            session_timeout_ms=broker.session_timeout_ms,
            heartbeat_interval_ms=broker.heartbeat_interval_ms,
            rebalance_timeout_ms=REBALANCE_TIMEOUT_MS,
            max_poll_interval_ms=MAX_POLL_INTERVAL_MS,
            fetch_max_wait_ms=100,
            max_partition_fetch_bytes=FETCH_BYTES,
            partition_assignment_strategy=(_strategy(together),),
        )
        self._consumer.subscribe([broker.named(topic) for topic in topics], listener=_Listener(self))

    async def start(self) -> None:
        """Returns when the group has admitted this member."""
        try:
            with translated(f"joining group {self._group}"):
                async with asyncio.timeout(JOIN_S):
                    await self._consumer.start()
        except BaseException:  # also when cancelled: nothing stays behind, and it is raised again
            await self.leave()
            raise

    async def poll(self, *, limit: int, timeout_s: float) -> list[Delivered]:
        if self._failure is not None:
            raise LogError(f"group {self._group}: handing over failed") from self._failure
        epoch = self.epoch
        with translated(f"polling for group {self._group}"):
            got = await whole(self._consumer.getmany(timeout_ms=int(timeout_s * 1000), max_records=limit))
        if self.epoch != epoch:
            return []
        return [delivered(self._broker, record) for records in got.values() for record in records]

    async def keep_alive(self) -> None:
        """An empty poll: without one for MAX_POLL_INTERVAL_MS aiokafka leaves the group."""
        mine = self._consumer.assignment()
        self._consumer.pause(*mine)
        with translated(f"polling for group {self._group}"):
            await whole(self._consumer.getmany(timeout_ms=0))
        self._consumer.resume(*(mine & self._consumer.assignment()))

    def seek(self, partition: TopicPartition, offset: int) -> None:
        with translated(f"seeking in {partition}"):
            self._consumer.seek(self._broker.there(partition), offset)

    async def position(self, partition: TopicPartition) -> int | None:
        try:
            async with asyncio.timeout(POSITION_S):
                return int(await self._consumer.position(self._broker.there(partition)))
        except (IllegalStateError, TimeoutError):
            return None

    async def commit(self, commits: Mapping[TopicPartition, Committed]) -> None:
        offsets = {self._broker.there(p): OffsetAndMetadata(*place) for p, place in commits.items()}
        with translated(f"commit of group {self._group}"):
            async with asyncio.timeout(COMMIT_S):
                await self._consumer.commit(offsets)

    async def leave(self) -> None:
        await stopped(self._consumer.stop())

    async def hand_over(self, revoked: set[aiokafka.TopicPartition]) -> None:
        """From the listener. aiokafka swallows what a listener raises: keep it for the next poll."""
        self.assigned = None
        self.epoch += 1
        try:
            await self._on_revoked(frozenset(self._broker.here(partition) for partition in revoked))
        except Exception as error:  # whatever it is, the next poll raises it
            self._failure = error
            raise

    def receive(self, assigned: set[aiokafka.TopicPartition]) -> None:
        """From the listener. No heartbeats run during this callback: the stage's loop does the long part."""
        self.assigned = frozenset(self._broker.here(partition) for partition in assigned)
        self.epoch += 1


class _Listener(ConsumerRebalanceListener):  # type: ignore[misc]
    def __init__(self, member: KafkaMember) -> None:
        self._member = member

    async def on_partitions_revoked(self, revoked: set[aiokafka.TopicPartition]) -> None:
        await self._member.hand_over(revoked)

    async def on_partitions_assigned(self, assigned: set[aiokafka.TopicPartition]) -> None:
        self._member.receive(assigned)


def _strategy(together: bool) -> type[Any]:
    """Range gives equal numbers of all topics to one member; sticky keeps its state in the class: one a consumer."""
    sticky: type[Any] = type(f"Sticky{uuid.uuid4().hex}", (StickyPartitionAssignor,), {})
    return RangePartitionAssignor if together else sticky
