"""The log on a real Kafka broker.

Owns the connections of one process: an admin connection, one idempotent producer, and whatever followers, members and
writers it opened. Invariant: acknowledged means acks=all; readers see committed transactions only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from weakref import WeakValueDictionary

from kat_stream.log.base import (
    Committed,
    Follower,
    Group,
    Member,
    Message,
    OnRevoked,
    Start,
    TopicPartition,
    Writer,
)
from kat_stream.log.kafka_admin import KafkaAdmin
from kat_stream.log.kafka_client import Broker
from kat_stream.log.kafka_follower import KafkaFollower
from kat_stream.log.kafka_member import KafkaMember
from kat_stream.log.kafka_producer import KafkaPublisher, KafkaWriter
from kat_stream.log.kafka_topics import Difference
from kat_stream.log.message import check, seal
from topics.catalogue import Topic
from topics.record import Record


class KafkaLog:
    """The `Log` protocol on Kafka."""

    def __init__(
        self,
        bootstrap: str,
        *,
        prefix: str,
        security: Mapping[str, object] | None = None,
        session_timeout_ms: int = 6000,
        heartbeat_interval_ms: int = 1000,
        max_poll_interval_ms: int = 300_000,
        static_member: bool = False,
    ) -> None:
        self._broker = Broker(
            bootstrap,
            prefix,
            security or {},
            session_timeout_ms,
            heartbeat_interval_ms,
            max_poll_interval_ms,
            static_member,
        )
        self._members: WeakValueDictionary[str, KafkaMember] = WeakValueDictionary()
        self._admin = KafkaAdmin(self._broker)
        self._publisher = KafkaPublisher(self._broker)

    async def start(self) -> None:
        await self._admin.start()

    async def close(self) -> None:
        await self._publisher.close()
        await self._admin.close()

    async def apply_topics(self, topics: Iterable[Topic]) -> list[str]:
        return await self._admin.apply_topics(topics)

    async def compare_topics(self, topics: Iterable[Topic]) -> list[Difference]:
        """How the broker's topics differ from these; see `kafka_topics`."""
        return await self._admin.compare_topics(topics)

    async def align_topics(self, differences: Sequence[Difference]) -> None:
        """Set the settings among the differences; LogError if a partition count differs."""
        await self._admin.align_topics(differences)

    async def publish(self, *records: Record, deadline_s: float = 30.0) -> None:
        await self.append(*[seal(record) for record in records], deadline_s=deadline_s)

    async def append(self, *messages: Message, deadline_s: float = 30.0) -> None:
        for message in messages:
            check(message)
            await self._admin.count(message.topic, "Write")
        await self._publisher.append(messages, deadline_s)

    def follow(
        self,
        topics: Sequence[str],
        *,
        start: Start = "earliest",
        partitions: Sequence[int] | None = None,
        poll_s: float = 0.2,
    ) -> Follower:
        return KafkaFollower(self._broker, self._admin, topics, start, partitions, poll_s)

    async def end_offsets(self, topic: str) -> dict[int, int]:
        return await self._admin.end_offsets(topic)

    async def high_watermarks(self, topic: str) -> dict[int, int]:
        return await self._admin.high_watermarks(topic)

    async def beginning_offsets(self, topic: str) -> dict[int, int]:
        return await self._admin.beginning_offsets(topic)

    async def delete_before(self, topic: str, offsets: dict[int, int]) -> None:
        """Remove a topic's messages below the given offset of each partition; LogError for a compacted topic."""
        await self._admin.delete_before(topic, offsets)

    async def committed(self, group: str) -> dict[TopicPartition, int]:
        return await self._admin.committed(group)

    async def commits(self, group: str) -> dict[TopicPartition, Committed]:
        return await self._admin.commits(group)

    async def topics(self) -> dict[str, int]:
        return await self._admin.topics()

    async def groups(self) -> list[Group]:
        return await self._admin.groups()

    async def join(
        self, topics: Sequence[str], *, group: str, member: str, on_revoked: OnRevoked, together: bool = False
    ) -> Member:
        for topic in topics:
            await self._admin.count(topic)
        joined = KafkaMember(self._broker, group, member, topics, on_revoked, together)
        await joined.start()
        self._members[group] = joined
        return joined

    async def writer(self, writer_id: str, *, group: str) -> Writer:
        opened = KafkaWriter(self._broker, writer_id, group, self._members.get(group))
        await opened.start()
        return opened
