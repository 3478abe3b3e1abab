"""Members and writers on a real broker, where aiokafka leaves holes: zombies, dead loops, poisoned producers."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

import anyio
import pytest
from aiokafka.errors import ProducerFenced

from kat_stream.errors import FencedError, LogError, LogUnavailable
from kat_stream.log import Committed, Delivered, Emit, Message, Outcome, TopicPartition, kafka_producer, run_work, work
from kat_stream.log.base import Member
from kat_stream.log.kafka import KafkaLog
from kat_stream.log.kafka_client import Broker
from kat_stream.log.kafka_producer import KafkaWriter
from kat_stream.log.message import seal
from tests.contract.conftest import TOPICS
from tests.contract.log_records import entry, everything, reward
from topics import partition_of

pytestmark = [pytest.mark.anyio, pytest.mark.kafka, pytest.mark.timeout(180)]
WAIT_S = 60.0
COUNT = 8
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


async def nothing(partitions: frozenset[TopicPartition]) -> None:
    """A member without work in hand has nothing to hand over."""


async def polled(member: Member, count: int, limit: int = 100) -> list[Delivered]:
    got: list[Delivered] = []
    with anyio.fail_after(WAIT_S):
        while len(got) < count:
            got += await member.poll(limit=min(limit, count - len(got)), timeout_s=0.2)
    return got


async def owned(*members: Member, each: int) -> list[frozenset[TopicPartition]]:
    """What each member owns, once all have settled on `each` partitions."""
    with anyio.fail_after(WAIT_S):
        while not all(len(member.assigned or ()) == each for member in members):
            await anyio.sleep(0.02)
    return [member.assigned or frozenset() for member in members]


GROUP = next(name for name in map(str, range(999)) if partition_of(reward(0, name)) == 11)
PLACE = TopicPartition("rewards", 11)
"""The last partition: a second member gets it."""


@pytest.mark.parametrize("bound", [False, True], ids=["aiokafka's own", "with its generation"])
async def test_a_member_that_lost_its_partition_commits_only_without_the_generation(place: Place, bound: bool) -> None:
    """Different transactional ids, so nothing but the generation can tell the zombie from the owner."""
    log_a, log_b = await place.client(), await place.client()
    await log_a.publish(*[reward(number, GROUP) for number in range(COUNT)])
    a = await place.member(log_a, "rewards")
    assert len(await polled(a, 5)) == 5
    b = await place.member(log_b, "rewards")
    await owned(a, b, each=6)
    assert PLACE in (b.assigned or ())
    await polled(b, COUNT)
    owner = await log_b.writer("owner", group="z")
    await owner.commit([seal(entry("g", str(number))) for number in range(COUNT)], {PLACE: Committed(COUNT)})
    zombie = await log_a.writer("zombie", group="z") if bound else place.unbound("zombie")
    if not bound:
        await zombie.start()  # type: ignore[attr-defined]
    late = [seal(entry("g", str(number))) for number in range(5)]
    if bound:
        with pytest.raises(FencedError, match="does not hold"):
            await zombie.commit(late, {PLACE: Committed(5)})
    else:
        await zombie.commit(late, {PLACE: Committed(5)})
    await zombie.close()
    await owner.close()
    assert await log_b.commits("z") == {PLACE: Committed(COUNT if bound else 5)}
    assert len(await everything(log_b, "ledger")) == (COUNT if bound else COUNT + 5)


async def test_a_place_that_an_open_transaction_is_about_to_move_is_waited_for(place: Place) -> None:
    log = await place.client()
    writer = place.unbound("slow")
    await writer.start()
    producer = writer._producer
    await producer.begin_transaction()
    await producer.send_offsets_to_transaction({place_there(place): 5}, f"{place.prefix}z")
    assert await log.committed("z") == {}
    with anyio.move_on_after(0.5) as waited:
        await log.commits("z")
    assert waited.cancelled_caught
    await producer.commit_transaction()
    assert await log.commits("z") == {PLACE: Committed(5)}
    await writer.close()


def place_there(place: Place) -> object:
    return Broker(place.bootstrap, place.prefix).there(PLACE)


async def test_joined_topics_stay_together_and_members_keep_what_they_have(place: Place) -> None:
    first = await place.member(await place.client(), "rewards", "ledger", together=True)
    (alone,) = await owned(first, each=24)
    second = await place.member(await place.client(), "rewards", "ledger", together=True)
    two = await owned(first, second, each=12)
    third = await place.member(await place.client(), "rewards", "ledger", together=True)
    three = await owned(first, second, third, each=8)
    assert len(alone) == 24
    assert three[0] < two[0] and three[1] < two[1]
    for mine in (*two, *three):
        assert {p.partition for p in mine if p.topic == "rewards"} == {p.partition for p in mine if p.topic == "ledger"}
    await third.leave()
    after = await owned(first, second, each=12)
    assert after[0] > three[0] and after[1] > three[1]


async def test_a_dead_loop_loses_its_partitions_although_its_polls_were_cancelled(place: Place) -> None:
    a = await place.member(await place.client(max_poll_interval_ms=1500), "rewards")
    for _ in range(5):
        with anyio.move_on_after(0.02):
            await a.poll(limit=1, timeout_s=0.1)
    b = await place.member(await place.client(), "rewards")
    assert len((await owned(b, each=12))[0]) == 12


async def test_a_task_longer_than_the_poll_interval_keeps_its_partition(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "KEEP_ALIVE_S", 0.5)
    handled: list[int] = []
    stopping, release = anyio.Event(), anyio.Event()
    log = await place.client(max_poll_interval_ms=2000)
    await log.publish(reward(0, GROUP))

    async def long(delivered: Delivered) -> Outcome:
        handled.append(delivered.position.offset)
        with anyio.move_on_after(WAIT_S):
            await release.wait()
        return Emit()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(
            lambda: run_work(log, ["rewards"], group="z", member="a", handler=long, stopping=stopping, max_in_flight=1)
        )
        with anyio.fail_after(WAIT_S):
            while not handled:
                await anyio.sleep(0.02)
        before = [group.members for group in await log.groups() if group.name == "z"]
        with anyio.move_on_after(6.0):  # three poll intervals: the group must not notice anything
            while [group.members for group in await log.groups() if group.name == "z"] == before:
                await anyio.sleep(0.1)
            pytest.fail("the member left its group")
        release.set()
        with anyio.fail_after(WAIT_S):
            while (await log.committed("z")).get(PLACE) != 1:
                await anyio.sleep(0.05)
        stopping.set()
    assert handled == [0]


async def test_one_rejected_record_does_not_poison_what_comes_after(place: Place) -> None:
    log = await place.client()
    keyless = Message("ledger", partition_of(entry("g", "a")), None, b"v", {})
    for _ in range(2):
        with pytest.raises((LogError, LogUnavailable)):
            await log._publisher.append([keyless], 10.0)  # past `check`, which refuses it
        await log.publish(entry("g", "a"))
    assert len(await everything(log, "ledger")) == 2


async def test_a_transaction_that_the_broker_timed_out_is_fenced_and_the_next_writer_goes_on(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = await place.client()
    monkeypatch.setattr(kafka_producer, "TRANSACTION_TIMEOUT_MS", 1000)
    writer = place.unbound("slow")
    await writer.start()
    await writer._producer.begin_transaction()
    await kafka_producer._send(writer._producer, Broker(place.bootstrap, place.prefix), [seal(entry("g", "lost"))])
    await log.publish(entry("g", "after"))
    with anyio.fail_after(WAIT_S):  # readers stand at the open transaction until the broker aborts it
        while not await everything(log, "ledger"):
            await anyio.sleep(0.2)
    with pytest.raises(ProducerFenced):
        await writer._producer.commit_transaction()
    await writer.close()
    again = await log.writer("slow", group="z")
    await again.commit([seal(entry("g", "again"))], {})
    await again.close()
    assert [d.record().rollout_id for d in await everything(log, "ledger")] == ["after", "again"]  # type: ignore[attr-defined]


async def test_closing_in_an_open_transaction_frees_the_readers(place: Place) -> None:
    log = await place.client()
    writer = await log.writer("torn", group="z")
    bad = Message("ledger", 0, None, b"v", {})
    with pytest.raises((LogError, LogUnavailable)):
        await writer.commit([seal(entry("g", "torn")), bad], {})
    await writer.close()
    await log.publish(entry("g", "after"))
    assert [d.record().rollout_id for d in await everything(log, "ledger")] == ["after"]  # type: ignore[attr-defined]


async def test_a_static_member_comes_back_to_its_partitions_unnoticed(place: Place) -> None:
    first = await place.member(await place.client(static_member=True), "rewards", name="pod-0")
    second = await place.member(await place.client(static_member=True), "rewards", name="pod-1")
    before = await owned(first, second, each=6)
    epoch = second.epoch
    await first.leave()
    back = await place.member(await place.client(static_member=True), "rewards", name="pod-0")
    (mine,) = await owned(back, each=6)
    assert mine == before[0] and second.epoch == epoch
