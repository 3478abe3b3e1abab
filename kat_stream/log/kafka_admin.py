"""Topics, offsets and groups of a broker: questions that any process may ask.

Invariant: nothing here belongs to a group or writes a record. Offsets are asked on a connection of their own, because
on a fetching one they queue behind the long poll (research/kafka_real.md 2.7).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from aiokafka import AIOKafkaConsumer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment
from aiokafka.errors import for_code
from aiokafka.protocol.commit import OffsetFetchRequest

from kat_stream.errors import LogError, LogUnavailable
from kat_stream.log.base import Committed, Group, TopicPartition
from kat_stream.log.kafka_client import CONNECT_S, Broker, stopped, translated
from kat_stream.log.message import OVERHEAD, largest
from topics.catalogue import Topic

ASK_S = 15.0
ALREADY_EXISTS = 36
REPLICAS = 3
"""Copies of a topic where there are as many brokers."""


class KafkaAdmin:
    """An admin connection and an unassigned consumer; both are opened by `start`."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._known: dict[str, int] = {}

    async def start(self) -> None:
        options = self._broker.options()
        self._admin = AIOKafkaAdminClient(**options)
        self._offsets = AIOKafkaConsumer(**options, isolation_level="read_committed", enable_auto_commit=False)
        with translated(f"no Kafka answers at {self._broker.bootstrap}"):
            async with asyncio.timeout(CONNECT_S):
                try:
                    await self._admin.start()
                    await self._offsets.start()
                except BaseException:  # also when cancelled: nothing stays behind, and it is raised again
                    await self.close()
                    raise

    async def close(self) -> None:
        await stopped(self._offsets.stop())
        await stopped(self._admin.close())

    async def apply_topics(self, topics: Iterable[Topic]) -> list[str]:
        wanted = list(topics)
        there = await self.topics()
        for topic in wanted:
            if there.get(topic.name, topic.partitions) != topic.partitions:
                count = there[topic.name]
                raise LogError(f"topic {topic.name} has {count} partitions, the catalogue says {topic.partitions}")
        missing = [topic for topic in wanted if topic.name not in there]
        if missing:
            await self._create(missing)
        return [topic.name for topic in missing]

    async def topics(self) -> dict[str, int]:
        described = await self._ask("topics", lambda: self._admin.describe_topics())
        prefix = self._broker.prefix
        ours = [topic for topic in described if topic["topic"].startswith(prefix) and not topic["is_internal"]]
        self._known = {topic["topic"].removeprefix(prefix): len(topic["partitions"]) for topic in ours}
        return dict(self._known)

    async def count(self, topic: str) -> int:
        """Partitions of a topic; LogError if it does not exist (a send to it would wait 40 s to say so)."""
        if topic not in self._known:
            await self.topics()
        if topic not in self._known:
            raise LogError(f"topic {topic} does not exist: apply the topics first")
        return self._known[topic]

    async def end_offsets(self, topic: str) -> dict[int, int]:
        return await self._offsets_of(topic, self._offsets.end_offsets)

    async def beginning_offsets(self, topic: str) -> dict[int, int]:
        return await self._offsets_of(topic, self._offsets.beginning_offsets)

    async def commits(self, group: str) -> dict[TopicPartition, Committed]:
        """Not aiokafka's list_consumer_group_offsets: it takes a group error for a group without offsets."""
        reply = await self._ask(f"offsets of group {group}", lambda: self._fetch_commits(self._broker.named(group)))
        found = {}
        for topic, partitions in reply.topics:
            name = topic.removeprefix(self._broker.prefix)
            for partition, offset, metadata, _ in partitions:
                if offset >= 0:
                    found[TopicPartition(name, partition)] = Committed(offset, metadata or "")
        return found

    async def groups(self) -> list[Group]:
        listed = await self._ask("groups", lambda: self._admin.list_consumer_groups())
        names = sorted(name for name, _ in listed if name.startswith(self._broker.prefix))
        return [await self._described(name) for name in names]

    async def _described(self, name: str) -> Group:
        """One by one: aiokafka reads the reply of a v3 request as v2, which goes wrong from the second group on."""
        replies = await self._ask(f"group {name}", lambda: self._admin.describe_consumer_groups([name]))
        return self._group(replies[0].groups[0])

    def _group(self, described: Any) -> Group:
        _, name, state, _, _, members = described[:6]
        return Group(
            name=name.removeprefix(self._broker.prefix),
            state=state,
            members={member[1]: self._partitions_of(member[4]) for member in members},
        )

    def _partitions_of(self, assignment: bytes) -> tuple[TopicPartition, ...]:
        if not assignment:
            return ()
        decoded = ConsumerProtocolMemberAssignment.decode(assignment).assignment
        prefix = self._broker.prefix
        return tuple(sorted(TopicPartition(t.removeprefix(prefix), p) for t, numbers in decoded for p in numbers))

    async def _fetch_commits(self, group: str) -> Any:
        node = await self._admin.find_coordinator(group)
        reply = await self._admin._send_request(OffsetFetchRequest(group, None), node)
        codes = [reply.error_code, *(partition[3] for _, partitions in reply.topics for partition in partitions)]
        for code in codes:
            if code:
                raise for_code(code)(f"group {group}")
        return reply

    async def _offsets_of(self, topic: str, ask: Callable[..., Awaitable[dict[Any, int]]]) -> dict[int, int]:
        count = await self.count(topic)
        partitions = [self._broker.there(TopicPartition(topic, number)) for number in range(count)]
        found = await self._ask(f"offsets of {topic}", lambda: ask(partitions))
        return {partition.partition: offset for partition, offset in found.items()}

    async def _create(self, topics: list[Topic]) -> None:
        nodes = (await self._ask("brokers", lambda: self._admin.describe_cluster()))["brokers"]
        new = [self._new_topic(topic, min(REPLICAS, len(nodes))) for topic in topics]
        with translated("creating topics"):
            async with asyncio.timeout(ASK_S):
                reply = await self._admin.create_topics(new)
        for name, code, message in reply.topic_errors:
            if code not in (0, ALREADY_EXISTS):
                raise LogError(f"topic {name}: {for_code(code).__name__} {message or ''}")
        await self._ask("new topics", lambda: self._visible({topic.name for topic in topics}))
        for topic in topics:  # a topic younger than half a second may have no leader: wait until it answers
            await self.end_offsets(topic.name)

    async def _visible(self, names: set[str]) -> None:
        missing = names - (await self.topics()).keys()
        if missing:
            raise LogUnavailable(f"created, but not in the metadata yet: {sorted(missing)}")

    def _new_topic(self, topic: Topic, replicas: int) -> NewTopic:
        config = {
            "cleanup.policy": topic.cleanup,
            "max.message.bytes": str(largest(topic) + OVERHEAD),
            "min.insync.replicas": str(max(1, replicas - 1)),
        }
        if topic.cleanup == "delete":
            config["retention.ms"] = str(topic.retention_ms)
        else:
            config["min.cleanable.dirty.ratio"] = "0.1"
        return NewTopic(self._broker.named(topic.name), topic.partitions, replicas, topic_configs=config)

    async def _ask[T](self, what: str, question: Callable[[], Awaitable[T]]) -> T:
        """Ask until there is an answer: a fresh broker or a moved coordinator refuses for a moment."""
        give_up = time.monotonic() + ASK_S
        while True:
            try:
                with translated(what):
                    async with asyncio.timeout(ASK_S):
                        return await question()
            except LogUnavailable:
                if time.monotonic() > give_up:
                    raise
            await asyncio.sleep(0.05)
