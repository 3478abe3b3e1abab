"""Topics, offsets and groups of a broker: questions that any process may ask.

Invariant: nothing here belongs to a group or writes a record. Offsets are asked on a connection of their own, because
on a fetching one they queue behind the long poll (research/kafka_real.md 2.7).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

from aiokafka import AIOKafkaConsumer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic, RecordsToDelete
from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment
from aiokafka.errors import TopicAuthorizationFailedError, for_code
from aiokafka.protocol.commit import OffsetFetchRequest

from kat_stream.errors import LogError, LogUnavailable
from kat_stream.log.base import Committed, Group, TopicPartition
from kat_stream.log.kafka_client import ASK_S, CONNECT_S, Broker, refused_at_the_door, stopped
from kat_stream.log.kafka_generation import UNSTABLE, StableOffsetFetch
from kat_stream.log.kafka_silent import wary
from kat_stream.log.kafka_topics import (
    REPLICAS,
    Difference,
    KafkaTopics,
    refuse_repartition,
    repartitioned,
    settings_of,
)
from topics.catalogue import Topic

logger = logging.getLogger(__name__)

ALREADY_EXISTS = 36


class KafkaAdmin:
    """An admin connection and an unassigned consumer; both are opened by `start`."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._known: dict[str, int] = {}

    async def start(self) -> None:
        options = self._broker.options()
        self._admin = wary(AIOKafkaAdminClient(**options))
        offsets = AIOKafkaConsumer(**options, isolation_level="read_committed", enable_auto_commit=False)
        self._offsets = wary(offsets)
        try:
            protocol = self._broker.security.get("security_protocol", "PLAINTEXT")
            with self._broker.translated(f"no Kafka answers at {self._broker.bootstrap} with protocol {protocol}"):
                async with asyncio.timeout(CONNECT_S):
                    await self._admin.start()
                    await self._offsets.start()
        except LogUnavailable:
            await self.close()
            await refused_at_the_door(self._broker)
            raise
        except BaseException:  # also when cancelled: nothing stays behind, and it is raised again
            await self.close()
            raise

    async def close(self) -> None:
        await stopped(self._offsets.stop())
        await stopped(self._admin.close())

    async def apply_topics(self, topics: Iterable[Topic]) -> list[str]:
        wanted = list(topics)
        there = await self.topics()
        refuse_repartition(repartitioned(wanted, there))
        missing = [topic for topic in wanted if topic.name not in there]
        if missing:
            await self._create(missing)
        return [topic.name for topic in missing]

    async def compare_topics(self, topics: Iterable[Topic]) -> list[Difference]:
        return await KafkaTopics(self._broker, self._admin).compare(topics)

    async def align_topics(self, differences: Sequence[Difference]) -> None:
        await KafkaTopics(self._broker, self._admin).align(differences)

    async def topics(self) -> dict[str, int]:
        described = await self._ask("topics", lambda: self._admin.describe_topics())
        prefix = self._broker.prefix
        ours = [topic for topic in described if topic["topic"].startswith(prefix) and not topic["is_internal"]]
        self._known = {topic["topic"].removeprefix(prefix): len(topic["partitions"]) for topic in ours}
        return dict(self._known)

    async def count(self, topic: str, operation: str = "Describe") -> int:
        """Partitions of a topic; LogError if it does not exist (a send to it would wait REQUEST_S to say so).

        `operation`: what it is asked for; without the right to do that a topic may not be seen at all.
        """
        if topic not in self._known:
            await self.topics()
        if topic not in self._known:
            await self._ask(f"topic {topic}", lambda: self._may_see(topic), operation)
            raise LogError(f"topic {topic} does not exist: apply the topics first")
        return self._known[topic]

    async def _may_see(self, topic: str) -> None:
        """A list of all topics leaves out what we may not see; asked by its name, the broker says so."""
        name = self._broker.named(topic)
        if (await self._admin.describe_topics([name]))[0]["error_code"] == TopicAuthorizationFailedError.errno:
            raise TopicAuthorizationFailedError(name)

    async def end_offsets(self, topic: str) -> dict[int, int]:
        return await self._offsets_of(topic, self._offsets.end_offsets)

    async def high_watermarks(self, topic: str) -> dict[int, int]:
        """Asked on a connection for this one question: a reader of committed messages is told less."""
        options = self._broker.options()
        asking = wary(AIOKafkaConsumer(**options, isolation_level="read_uncommitted", enable_auto_commit=False))
        try:
            with self._broker.translated(f"offsets of {topic}"):
                async with asyncio.timeout(CONNECT_S):
                    await asking.start()
            return await self._offsets_of(topic, asking.end_offsets)
        finally:
            await stopped(asking.stop())

    async def beginning_offsets(self, topic: str) -> dict[int, int]:
        return await self._offsets_of(topic, self._offsets.beginning_offsets)

    async def delete_before(self, topic: str, offsets: dict[int, int]) -> None:
        wanted = {
            self._broker.there(TopicPartition(topic, number)): RecordsToDelete(before_offset=offset)
            for number, offset in offsets.items()
        }
        await self._ask(f"removing messages of {topic}", lambda: self._admin.delete_records(wanted))

    async def commits(self, group: str) -> dict[TopicPartition, Committed]:
        """Every place that is stable, or has been since the call began; LogUnavailable if one does not become so."""
        found: dict[TopicPartition, Committed] = {}
        topics = {self._broker.named(topic): range(count) for topic, count in (await self.topics()).items()}
        question = StableOffsetFetch(self._broker.named(group), topics)
        await self._ask(f"offsets of group {group}", lambda: self._settle_commits(group, question, found))
        return found

    async def committed(self, group: str) -> dict[TopicPartition, int]:
        """Not aiokafka's list_consumer_group_offsets: it takes a group error for a group without offsets."""
        question = OffsetFetchRequest(self._broker.named(group), None)
        reply = await self._ask(f"offsets of group {group}", lambda: self._ask_coordinator(group, question))
        for _, partitions in reply.topics:
            _raise_for([code for *_, code in partitions], group)
        places = ((topic, number, offset) for topic, partitions in reply.topics for number, offset, *_ in partitions)
        prefix = self._broker.prefix
        return {TopicPartition(t.removeprefix(prefix), number): offset for t, number, offset in places if offset >= 0}

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

    async def _settle_commits(
        self, group: str, question: StableOffsetFetch, found: dict[TopicPartition, Committed]
    ) -> None:
        """Add the places that are stable now. A busy group is never stable everywhere at once."""
        reply = await self._ask_coordinator(group, question)
        unstable = []
        for topic, partitions, _ in reply.topics:
            for number, offset, _, metadata, code, _ in partitions:
                place = TopicPartition(topic.removeprefix(self._broker.prefix), number)
                if code == UNSTABLE:
                    unstable += [place] if place not in found else []
                    continue
                _raise_for([code], group)
                if offset >= 0:
                    found[place] = Committed(offset, metadata or "")
        if unstable:
            raise LogUnavailable(f"group {group}: open transactions are about to move {unstable}")

    async def _ask_coordinator(self, group: str, question: Any) -> Any:
        node = await self._admin.find_coordinator(self._broker.named(group))
        reply = await self._admin._send_request(question, node)
        _raise_for([reply.error_code], group)
        return reply

    async def _offsets_of(self, topic: str, ask: Callable[..., Awaitable[dict[Any, int]]]) -> dict[int, int]:
        count = await self.count(topic)
        partitions = [self._broker.there(TopicPartition(topic, number)) for number in range(count)]
        found = await self._ask(f"offsets of {topic}", lambda: ask(partitions))
        return {partition.partition: offset for partition, offset in found.items()}

    async def _create(self, topics: list[Topic]) -> None:
        nodes = (await self._ask("brokers", lambda: self._admin.describe_cluster()))["brokers"]
        if 1 < len(nodes) < REPLICAS:  # an error, so that it reaches the terminal of a run
            logger.error(
                "%d topics get %d copies, not %d: the cluster has only so many brokers now. If one is away: start it, "
                "give them more copies by Kafka's kafka-reassign-partitions, then `kat-stream topics apply` "
                "(ops/runbooks/kafka.md, In-sync copies shrink)", len(topics), len(nodes), REPLICAS,
            )  # fmt: skip
        new = [self._new_topic(topic, min(REPLICAS, len(nodes))) for topic in topics]
        reply = await self._ask("creating topics", lambda: self._created(new), "Create")
        for name, code, message in reply.topic_errors:
            if code not in (0, ALREADY_EXISTS):
                raise LogError(f"topic {name}: {for_code(code).__name__} {message or ''}")
        await self._ask("new topics", lambda: self._visible({topic.name for topic in topics}))
        for topic in topics:  # a topic younger than half a second may have no leader: wait until it answers
            await self.end_offsets(topic.name)

    async def _created(self, new: list[NewTopic]) -> Any:
        """Asked again, it finds what an earlier question without an answer has made: ALREADY_EXISTS."""
        reply = await self._admin.create_topics(new)
        for name, code, _ in reply.topic_errors:
            if code == TopicAuthorizationFailedError.errno:
                raise TopicAuthorizationFailedError(name)
        return reply

    async def _visible(self, names: set[str]) -> None:
        missing = names - (await self.topics()).keys()
        if missing:
            raise LogUnavailable(f"created, but not in the metadata yet: {sorted(missing)}")

    def _new_topic(self, topic: Topic, replicas: int) -> NewTopic:
        name = self._broker.named(topic.name)
        return NewTopic(name, topic.partitions, replicas, topic_configs=settings_of(topic, replicas))

    async def _ask[T](self, what: str, question: Callable[[], Awaitable[T]], operation: str = "Describe") -> T:
        """Ask until there is an answer: a fresh broker or a moved coordinator refuses for a moment."""
        give_up = time.monotonic() + ASK_S
        while True:
            try:
                with self._broker.translated(what, operation):
                    async with asyncio.timeout(ASK_S):
                        return await question()
            except LogUnavailable:
                if time.monotonic() > give_up:
                    raise
            await asyncio.sleep(0.05)


def _raise_for(codes: Iterable[int], group: str) -> None:
    for code in codes:
        if code:
            raise for_code(code)(f"group {group}")
