"""Reading a broker without a group.

Invariant: every partition is sought explicitly; an offset that retention removed is an error, not a silent jump.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from aiokafka import AIOKafkaConsumer

from kat_stream.log.base import Delivered, Start, TopicPartition
from kat_stream.log.follower import BaseFollower
from kat_stream.log.kafka_admin import KafkaAdmin
from kat_stream.log.kafka_client import CONNECT_S, Broker, stopped
from kat_stream.log.kafka_member import delivered
from kat_stream.log.kafka_silent import wary

FETCH = 500
"""Messages a follower takes at once."""


class KafkaFollower(BaseFollower):
    """The `Follower` protocol."""

    def __init__(
        self,
        broker: Broker,
        admin: KafkaAdmin,
        topics: Sequence[str],
        start: Start,
        partitions: Sequence[int] | None,
        poll_s: float,
    ) -> None:
        super().__init__(poll_s)
        self._broker = broker
        self._admin = admin
        self._topics = topics
        self._start = start
        self._numbers = partitions
        self._positions: dict[TopicPartition, int] = {}
        self._consumer: AIOKafkaConsumer | None = None
        self._opening = asyncio.Lock()
        self._fetching: asyncio.Future[dict[Any, list[Any]]] | None = None
        """A poll that a cancelled caller left behind: the next one takes its messages."""

    async def open(self) -> None:
        async with self._opening:
            if self._consumer is None:
                starts = await self._starts()
                self._consumer = await self._connect(starts)
                self._positions = starts

    async def _connect(self, starts: Mapping[TopicPartition, int]) -> AIOKafkaConsumer:
        consumer = wary(
            AIOKafkaConsumer(
                **self._broker.options(),
                enable_auto_commit=False,
                auto_offset_reset="none",
                isolation_level="read_committed",
                fetch_max_wait_ms=100,
            )
        )
        try:
            with self._broker.translated(f"following {', '.join(self._topics)}", "Read"):
                async with asyncio.timeout(CONNECT_S):
                    await consumer.start()
                consumer.assign([self._broker.there(partition) for partition in starts])
                for partition, offset in starts.items():
                    consumer.seek(self._broker.there(partition), offset)
        except BaseException:  # also when cancelled: nothing stays behind, and it is raised again
            await stopped(consumer.stop())
            raise
        return consumer

    async def aclose(self) -> None:
        if self._consumer is not None:
            await stopped(self._consumer.stop())
        if self._fetching is not None:
            await asyncio.wait([self._fetching])
            self._fetching.exception()

    async def _fetch(self, timeout_s: float) -> list[Delivered]:
        await self.open()
        assert self._consumer is not None
        if self._fetching is None:
            poll = self._consumer.getmany(timeout_ms=int(timeout_s * 1000), max_records=FETCH)
            self._fetching = asyncio.ensure_future(poll)
        with self._broker.translated(f"reading {', '.join(self._topics)}", "Read"):
            await asyncio.wait([self._fetching])
            fetched, self._fetching = self._fetching, None
            got = fetched.result()
        messages = [delivered(self._broker, record) for records in got.values() for record in records]
        for message in messages:
            self._positions[message.position.topic_partition] = message.position.offset + 1
        return messages

    async def _starts(self) -> dict[TopicPartition, int]:
        starts = {}
        for topic in self._topics:
            at_end = self._start == "latest"
            ask = self._admin.end_offsets if at_end else self._admin.beginning_offsets
            for number, offset in (await ask(topic)).items():
                if self._numbers is None or number in self._numbers:
                    starts[TopicPartition(topic, number)] = offset
        if isinstance(self._start, Mapping):
            starts.update({p: self._start[p] for p in starts.keys() & self._start.keys()})
        return starts

    async def _ends(self) -> dict[TopicPartition, int]:
        ends = {topic: await self._admin.end_offsets(topic) for topic in self._topics}
        return {partition: ends[partition.topic][partition.partition] for partition in self._positions}

    async def _reached(self, ends: dict[TopicPartition, int]) -> bool:
        """By the consumer's own positions: they pass transaction markers and compacted gaps."""
        assert self._consumer is not None
        with self._broker.translated(f"reading {', '.join(self._topics)}", "Read"):
            for partition, end in ends.items():
                if await self._consumer.position(self._broker.there(partition)) < end:
                    return False
        return True

    def _fetched(self) -> dict[TopicPartition, int]:
        return dict(self._positions)
