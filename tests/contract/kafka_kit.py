"""A place of one's own on a real broker, its clients and members, and brokers that a test may kill.

The traps of Kafka and aiokafka have the numbers of research/kafka_real.md. Where each is closed:
test_kafka_facts_*.py: what carries its number in its name
test_log_kafka_members.py: 1.4 static member, 1.6 sticky, 2.1 long tasks, 2.2 and 2.4 dead loops, 3.5 zombies and
    pending places, 3.9 timed-out writer, 3.11 stop with an open transaction, 12.1 poisoned producer
test_kafka_outage.py: 1.10 commits, 5.5 too few copies, 12.5 closing; test_log_kill.py: 1.10, 5.6 restart of the broker
tests/chaos: 1.9 and 3.5 as processes that stand still, 1.11, 5.2, 5.3 a leader or coordinator gone
test_topics_kafka.py: 9.2, 9.3 settings; test_log.py: 9.7 unknown topic; test_access.py: 10 the rest
Speed only (2.7, 3.3, 4, 7, 8.2, 11) is measured by tests/benchmarks.
"""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

import anyio
import pytest

from kat_stream.log import Delivered, Log, TopicPartition, broker
from kat_stream.log.base import Member
from kat_stream.log.kafka import KafkaLog
from kat_stream.log.kafka_client import Broker
from kat_stream.log.kafka_producer import KafkaWriter
from tests.contract.conftest import TOPICS
from tests.contract.log_records import everything, nothing, reward
from tests.waiting import until, wait_for
from topics import partition_of

WAIT_S = 60.0
Client = Callable[..., Awaitable[KafkaLog]]


class Place:
    """One prefix on the broker, and clients of it."""

    def __init__(self, bootstrap: str, opened: AsyncExitStack) -> None:
        self.bootstrap, self.prefix = bootstrap, f"m{uuid.uuid4().hex[:8]}."
        self._opened = opened

    async def client(self, **options: int) -> KafkaLog:
        settings = {"session_timeout_ms": 6000, "heartbeat_interval_ms": 200, **options}
        log = KafkaLog(self.bootstrap, prefix=self.prefix, **settings)  # type: ignore[arg-type]
        await log.start()
        self._opened.push_async_callback(log.close)
        return log

    async def member(self, log: KafkaLog, *topics: str, together: bool = False, name: str = "m") -> Member:
        joined = await log.join(topics, group="z", member=name, on_revoked=nothing, together=together)
        self._opened.push_async_callback(joined.leave)
        return joined

    def unbound(self, writer_id: str) -> KafkaWriter:
        """A writer as aiokafka makes it: it knows no generation."""
        return KafkaWriter(Broker(self.bootstrap, self.prefix), writer_id, "z", None)


@pytest.fixture
async def place(kafka_bootstrap: str) -> AsyncIterator[Place]:
    async with AsyncExitStack() as opened:
        made = Place(kafka_bootstrap, opened)
        await (await made.client()).apply_topics(TOPICS)
        yield made


async def polled(member: Member, count: int, limit: int = 100) -> list[Delivered]:
    got: list[Delivered] = []
    with anyio.fail_after(WAIT_S):
        while len(got) < count:
            got += await member.poll(limit=min(limit, count - len(got)), timeout_s=0.2)
    return got


async def owned(*members: Member, each: int) -> list[frozenset[TopicPartition]]:
    """What each member owns, once all have settled on `each` partitions."""
    await until(lambda: all(len(member.assigned or ()) == each for member in members), f"{each} partitions each")
    return [member.assigned or frozenset() for member in members]


GROUP = next(name for name in map(str, range(999)) if partition_of(reward(0, name)) == 11)
PLACE = TopicPartition("rewards", 11)
"""The last partition: a second member gets it."""


async def ids(log: Log) -> list[str]:
    """Rollouts of all readable ledger entries."""
    return [d.record().rollout_id for d in await everything(log, "ledger")]  # type: ignore[attr-defined]


@contextmanager
def own_broker(state: Path) -> Iterator[str]:
    try:
        yield broker.up(state)
    finally:
        broker.down(state)


def kill_broker(state: Path) -> None:
    os.kill(broker.status(state).pid, signal.SIGKILL)
    wait_for(lambda: not broker.status(state).running, "the end of the broker")
