"""A member of a consumer group on Kafka, with aiokafka's traps closed.

Invariant: a message is handed out only if the assignment did not change while it was fetched; a poll is never
cancelled; ownership comes from the callbacks, never from `assignment()` (research/kafka_real.md 1.7, 2.4).
`position` is what was handed out, not what was fetched. `holder` is what this member was at its last poll, not what it
is now: a member that lost its partitions and came back must not commit what it polled before.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import aiokafka
from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener
from aiokafka.errors import IllegalStateError
from aiokafka.structs import ConsumerRecord, OffsetAndMetadata

from kat_stream.errors import FencedError, LogError
from kat_stream.log.base import Committed, Delivered, OnRevoked, Position, TopicPartition
from kat_stream.log.fair import FairBuffer
from kat_stream.log.kafka_assignor import Claim, assignor
from kat_stream.log.kafka_client import Broker, stopped
from kat_stream.log.kafka_generation import NOBODY, Holder
from kat_stream.log.kafka_silent import wary
from kat_stream.whole import whole

FETCH_BYTES = 1 << 20
"""A partition's share of what is fetched ahead; a larger message comes whole."""
FETCH = 10_000
"""Messages taken from aiokafka at once: all that it has, so that age decides and not the partition."""
NOWHERE = aiokafka.TopicPartition("", 0)
"""Asked for its messages, aiokafka finds none, and knows that the loop lives."""
JOIN_S = 60.0
COMMIT_S = 10.0
POSITION_S = 1.0
"""A position is known at once after a seek; it is not while partitions move."""
REBALANCE_TIMEOUT_MS = 60_000
"""How long the group waits for a member that hands over; aiokafka's default is the session timeout."""
LOSSES = 5
"""A static member that is thrown out so often within fewer sessions has a double."""


def delivered(broker: Broker, record: ConsumerRecord[Any, Any]) -> Delivered:
    """aiokafka's record as ours: a header without a value, which Kafka allows, has an empty one."""
    position = Position(record.topic.removeprefix(broker.prefix), record.partition, record.offset)
    headers = {name: text or b"" for name, text in record.headers}
    return Delivered(position, record.key, record.value or b"", headers, record.timestamp)


class KafkaMember:
    """The `Member` protocol."""

    def __init__(
        self, broker: Broker, group: str, name: str, topics: Sequence[str], on_revoked: OnRevoked, together: bool
    ) -> None:
        self.epoch = 0
        self.assigned: frozenset[TopicPartition] | None = None
        self.holder = NOBODY
        self._admitted = NOBODY
        self._buffer = FairBuffer()
        self._assignor = assignor(together)
        self._broker = broker
        self._group = group
        self._on_revoked = on_revoked
        self._failure: Exception | None = None
        self._name = name
        self._as = f" as static member {name}, of which there may be one" if broker.static_member else ""
        """For errors: what a broker says to a double (FENCED_INSTANCE_ID) aiokafka calls UnknownError."""
        self._losses: deque[float] = deque(maxlen=LOSSES)
        """When (monotonic) the group did not know this member any more."""
        self._consumer = AIOKafkaConsumer(
            **broker.options(),
            group_id=broker.named(group),
            group_instance_id=f"{group}.{name}" if broker.static_member else None,
            client_id=name,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            session_timeout_ms=broker.session_timeout_ms,
            heartbeat_interval_ms=broker.heartbeat_interval_ms,
            rebalance_timeout_ms=REBALANCE_TIMEOUT_MS,
            max_poll_interval_ms=broker.max_poll_interval_ms,
            fetch_max_wait_ms=100,
            max_partition_fetch_bytes=FETCH_BYTES,
            partition_assignment_strategy=(self._assignor,),
        )
        wary(self._consumer)
        self._consumer.subscribe([broker.named(topic) for topic in topics], listener=_Listener(self))

    async def start(self) -> None:
        """Returns when the group has admitted this member."""
        try:
            with self._broker.translated(f"joining group {self._group}{self._as}", "Read"):
                async with asyncio.timeout(JOIN_S):
                    await self._consumer.start()
        except BaseException:  # also when cancelled: nothing stays behind, and it is raised again
            await self.leave()
            raise

    async def poll(self, *, limit: int, timeout_s: float) -> list[Delivered]:
        if self._failure is not None:
            raise LogError(f"group {self._group}: handing over failed: {self._failure}") from self._failure
        epoch = self.epoch
        with self._broker.translated(f"polling for group {self._group}{self._as}", "Read"):
            got = await whole(self._fetch(timeout_s))
        if self.epoch != epoch:
            return []
        self.holder = self._admitted
        for place, records in got.items():
            self._buffer.put(self._broker.here(place), [delivered(self._broker, record) for record in records])
        return self._buffer.take(limit)

    async def _fetch(self, timeout_s: float) -> dict[aiokafka.TopicPartition, list[ConsumerRecord[Any, Any]]]:
        """What aiokafka has for the partitions of which nothing waits here; waits only if nothing waits at all."""
        mine = self.assigned or frozenset()
        wanted = [self._broker.there(partition) for partition in mine if self._buffer.wants(partition)] or [NOWHERE]
        timeout_ms = 0 if self._buffer.ready else int(timeout_s * 1000)
        try:
            got: dict[aiokafka.TopicPartition, list[ConsumerRecord[Any, Any]]] = await self._consumer.getmany(
                *wanted, timeout_ms=timeout_ms, max_records=FETCH
            )
        except BaseException:  # aiokafka would count this poll as running for ever and never miss a dead loop (2.4)
            self._consumer._subscription._fetch_count = 0
            raise
        return got

    async def keep_alive(self) -> None:
        """A poll of nothing: without one for `max_poll_interval_ms` aiokafka leaves the group."""
        with self._broker.translated(f"polling for group {self._group}", "Read"):
            await whole(self._consumer.getmany(NOWHERE, timeout_ms=0))

    def seek(self, partition: TopicPartition, offset: int) -> None:
        self._buffer.drop(partition)
        with self._broker.translated(f"seeking in {partition}", "Read"):
            self._consumer.seek(self._broker.there(partition), offset)

    def pause(self, partition: TopicPartition) -> None:
        self._buffer.pause(partition)

    def resume(self, partition: TopicPartition) -> None:
        self._buffer.resume(partition)

    async def position(self, partition: TopicPartition) -> int | None:
        waiting = self._buffer.position(partition)
        if waiting is not None:
            return waiting
        with self._broker.translated(f"position in {partition}", "Read"):
            try:
                async with asyncio.timeout(POSITION_S):
                    return int(await self._consumer.position(self._broker.there(partition)))
            except (IllegalStateError, TimeoutError):
                return None

    async def commit(self, commits: Mapping[TopicPartition, Committed]) -> None:
        if self._membership() != self._admitted:  # without one, a broker takes a commit if the group is empty (2.3)
            raise FencedError(
                f"commit of group {self._group}: this member has left it, its partitions may be others' now"
            )
        offsets = {self._broker.there(p): OffsetAndMetadata(*place) for p, place in commits.items()}
        with self._broker.translated(f"commit of group {self._group}", "Read"):
            async with asyncio.timeout(COMMIT_S):
                await self._consumer.commit(offsets)

    async def leave(self) -> None:
        await stopped(self._consumer.stop())

    async def hand_over(self, revoked: set[aiokafka.TopicPartition]) -> None:
        """From the listener. aiokafka swallows what a listener raises: keep it for the next poll."""
        lost = self.assigned is not None and self._membership().generation < 0
        self.assigned = None
        self.epoch += 1
        self._buffer.clear()
        try:
            if lost and self._broker.static_member:
                self._note_loss()
            await self._on_revoked(frozenset(self._broker.here(partition) for partition in revoked))
        except Exception as error:  # whatever it is, the next poll raises it
            self._failure = error
            raise

    def receive(self, assigned: set[aiokafka.TopicPartition]) -> None:
        """From the listener. No heartbeats run during this callback: the stage's loop does the long part."""
        self._admitted = self._membership()
        self._assignor.claim = Claim(self._admitted.generation, frozenset((p.topic, p.partition) for p in assigned))
        self.assigned = frozenset(self._broker.here(partition) for partition in assigned)
        self.epoch += 1
        self._buffer.clear()

    def _note_loss(self) -> None:
        """LogError if the group threw this member out more often than silence explains, which takes a session each."""
        now = time.monotonic()
        self._losses.append(now)
        span_s = (LOSSES - 1) * self._broker.session_timeout_ms / 1000
        if len(self._losses) == LOSSES and now - self._losses[0] < span_s:
            raise LogError(
                f"static member {self._name}: another live process has this name, and they take the partitions from"
                " each other; give each process a --member of its own, or set log.static_member = false"
            )

    def _membership(self) -> Holder:
        """What the coordinator knows us as; NOBODY's generation while we are out of the group."""
        coordinator = self._consumer._coordinator
        return Holder(coordinator.generation, coordinator.member_id, coordinator._group_instance_id)


class _Listener(ConsumerRebalanceListener):  # type: ignore[misc]
    def __init__(self, member: KafkaMember) -> None:
        self._member = member

    async def on_partitions_revoked(self, revoked: set[aiokafka.TopicPartition]) -> None:
        await self._member.hand_over(revoked)

    async def on_partitions_assigned(self, assigned: set[aiokafka.TopicPartition]) -> None:
        self._member.receive(assigned)
