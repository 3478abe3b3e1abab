"""Traps of reading and administering a real Kafka, each closed, named by its point (kafka_kit.py)."""

from __future__ import annotations

import os
import uuid

import anyio
import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions

from kat_stream.config import SecuritySection
from kat_stream.errors import DataError, DecodeError, LogError, LogUnavailable
from kat_stream.log import (
    Committed,
    Delivered,
    Emit,
    Message,
    Outcome,
    kafka_producer,
    open_log,
    run_work,
)
from kat_stream.log.base import Member
from kat_stream.log.kafka_client import Broker
from kat_stream.log.lag import lags
from kat_stream.log.message import largest, seal
from kat_stream.versions import Versions
from tests.contract.conftest import TOPICS
from tests.contract.kafka_kit import GROUP, PLACE, Place, nothing, place, polled
from tests.contract.log_records import entry, everything, reward
from tests.waiting import until
from topics import PolicyVersion, partition_of, topic_named

__all__ = ["place"]
pytestmark = [pytest.mark.anyio, pytest.mark.kafka, pytest.mark.timeout(240)]
ENTRY_PLACE = partition_of(entry(GROUP, "any"))


@pytest.mark.parametrize("topic", ["ledger", "dead.letters"])
async def test_7_5_the_largest_that_passes_our_check_is_taken_and_one_byte_more_poisons_nothing(
    place: Place, topic: str
) -> None:
    """Random bytes: compression saves nothing. Headers count: the broker's limit is for the whole batch."""
    log = await place.client()
    headers = {"record": b"X/1", "blobs": os.urandom(100_000)}
    room = largest(topic_named(topic)) - 3 - sum(len(name) + len(text) for name, text in headers.items())
    value = os.urandom(room)
    await log.append(Message(topic, 0, b"key", value, headers))
    with pytest.raises(DataError, match="the topic takes"):
        await log.append(Message(topic, 0, b"key", value + b"x", headers))
    await log.append(Message(topic, 0, b"key", b"small", {}))
    assert [len(d.value) for d in await everything(log, topic)] == [room, 5]


async def test_8_1_reading_to_the_end_never_hangs_on_what_is_no_record(place: Place) -> None:
    """A partition may end with records that were taken back and with markers: no record has the last offset."""
    log = await place.client()
    writer = await log.writer("w", group="z")
    await writer.commit([seal(entry(GROUP, "kept"))], {})
    await writer.close()
    torn = place.unbound("w")
    await torn.start()
    await torn._producer.begin_transaction()
    await kafka_producer._send(torn._producer, Broker(place.bootstrap, place.prefix), [seal(entry(GROUP, "gone"))])
    await torn._producer.abort_transaction()
    await torn.close()
    assert (await log.end_offsets("ledger"))[ENTRY_PLACE] == 4  # a record and a marker, twice
    async with log.follow(["ledger"]) as follower:
        found = [d.record().rollout_id async for d in follower.catch_up(20.0)]  # type: ignore[attr-defined]
        assert found == ["kept"] and await follower.caught_up()


async def test_8_4_a_tombstone_is_read_as_no_record(place: Place) -> None:
    """An operator may delete a key of a compacted topic; who reads it as a table passes over the tombstone."""
    log = await place.client()
    await log.apply_topics([topic_named("policy.versions")])
    producer = AIOKafkaProducer(bootstrap_servers=place.bootstrap)
    await producer.start()
    await producer.send_and_wait(f"{place.prefix}policy.versions", None, b"m")
    await producer.stop()
    await log.publish(PolicyVersion(run="r", model="m", lineage="a", number=3, path="", checksum=""))
    (tombstone, _) = await everything(log, "policy.versions")
    with pytest.raises(DecodeError):
        tombstone.record()
    versions = Versions("r")
    await versions.load(log)
    assert versions.newest is not None and versions.newest.number == 3


async def test_9_1_topics_that_two_apply_at_once_are_made_once(kafka_bootstrap: str) -> None:
    prefix = f"a{uuid.uuid4().hex[:8]}."
    clients = [open_log(f"kafka:{kafka_bootstrap}", prefix=prefix) for _ in range(3)]
    for client in clients:
        await client.start()
    async with anyio.create_task_group() as tasks:
        for client in clients:
            tasks.start_soon(client.apply_topics, TOPICS)
    assert await clients[0].topics() == {topic.name: topic.partitions for topic in TOPICS}
    for client in clients:
        await client.close()


async def test_partitions_that_are_added_to_a_live_topic_tear_no_group_apart(place: Place) -> None:
    """A writer that is opened later, as partitions moved, is told the new number; the group has records already."""
    log, count = await place.client(), topic_named("rewards").partitions
    await log.publish(reward(0, GROUP))
    admin = AIOKafkaAdminClient(bootstrap_servers=place.bootstrap)
    await admin.start()
    await admin.create_partitions({f"{place.prefix}rewards": NewPartitions(count + 1)})
    await admin.close()

    async def grown() -> bool:
        return (await log.topics())["rewards"] == count + 1

    await until(grown, "another partition")
    writer = await log.writer("w", group="z")
    await writer.commit([seal(reward(1, GROUP))], {})
    await writer.close()
    assert [d.position.partition for d in await everything(log, "rewards")] == [PLACE.partition] * 2


async def test_9_4_every_group_is_described_as_it_is(place: Place) -> None:
    """aiokafka reads one reply for several groups wrongly from the second on."""
    members: dict[str, Member] = {}
    log = await place.client()
    for name, topic in (("one", "rewards"), ("two", "ledger"), ("three", "train.steps")):
        members[name] = await (await place.client()).join([topic], group=name, member=f"m-{name}", on_revoked=nothing)
    found = {group.name: (group.state, group.members) for group in await log.groups()}
    assert found == {
        name: ("Stable", {f"m-{name}": tuple(sorted(member.assigned or ()))}) for name, member in members.items()
    }
    for member in members.values():
        await member.leave()


async def test_9_5_markers_are_no_lag(place: Place) -> None:
    """They take offsets: who commits the last record and one would be behind for ever."""
    log, stopping = await place.client(), anyio.Event()
    writer = await log.writer("w", group="y")
    for number in range(3):
        await writer.commit([seal(entry(f"g{n}", f"{number}-{n}")) for n in range(6)], {})
    await writer.close()
    taken: list[str] = []

    async def take(delivered: Delivered) -> Outcome:
        taken.append(delivered.record().rollout_id)  # type: ignore[attr-defined]
        return Emit()

    async def no_lag() -> bool:
        return len(taken) == 18 and [lag.messages for lag in await lags(log) if lag.topic == "ledger"] == [0]

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: run_work(log, ["ledger"], group="w", member="m", handler=take, stopping=stopping))
        await until(no_lag, "no lag")
        stopping.set()
    assert sum((await log.committed("w")).values()) > 18


async def test_9_6_what_retention_removed_is_an_error_to_a_reader_and_said_by_a_stage(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    log, stopping, taken = await place.client(), anyio.Event(), list[float]()
    await log.publish(*[reward(number, GROUP) for number in range(5)])
    member = await place.member(log, "rewards")
    await polled(member, 1)
    await member.commit({PLACE: Committed(1)})
    await member.leave()
    await log.delete_before("rewards", {PLACE.partition: 3})
    async with log.follow(["rewards"], start={PLACE: 1}) as follower:
        with pytest.raises(LogError, match="reading rewards"):
            async for _ in follower.catch_up(20.0):
                pass

    async def take(delivered: Delivered) -> Outcome:
        taken.append(delivered.record().score)  # type: ignore[attr-defined]
        return Emit()

    async def done() -> bool:
        return len(taken) == 2

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: run_work(log, ["rewards"], group="z", member="m", handler=take, stopping=stopping))
        await until(done, "what is left")
        stopping.set()
    assert taken == [3, 4] and "rewards[11]: 2 messages expired unread" in caplog.text


async def test_10_4_tls_at_a_plaintext_port_is_said(kafka_bootstrap: str) -> None:
    """The broker just closes the connection, and aiokafka says `Unable to bootstrap` whatever is wrong."""
    log = open_log(f"kafka:{kafka_bootstrap}", security=SecuritySection(protocol="SSL"))
    with pytest.raises(LogUnavailable, match=f"no Kafka answers at {kafka_bootstrap} with protocol SSL"):
        await log.start()
