"""What a real Kafka and aiokafka do that they should not, or do not say: each trap closed, named by its point.

The points are those of research/kafka_real.md. Closed elsewhere:
test_log_kafka_members.py: 1.4 static member, 1.6 sticky, 2.1 long tasks, 2.2 and 2.4 dead loops, 3.5 zombies and
    pending places, 3.9 timed-out writer, 3.11 stop with an open transaction, 12.1 poisoned producer
test_kafka_outage.py: 1.10 commits, 5.5 too few copies, 12.5 closing; test_log_kill.py: 1.10, 5.6 restart of the broker
tests/chaos: 1.9 and 3.5 as processes that stand still, 1.11, 5.2, 5.3 a leader or coordinator gone
test_topics_kafka.py: 9.2, 9.3 settings; test_log.py: 9.7 unknown topic; test_access.py: 10 the rest
Speed only (2.7, 3.3, 4, 7, 8.2, 11) is measured by tests/benchmarks.
"""

from __future__ import annotations

import inspect
import logging
import os
import time
import uuid
from collections import Counter
from collections.abc import Callable

import anyio
import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.producer import sender

from kat_stream.config import SecuritySection
from kat_stream.errors import DataError, DecodeError, FencedError, LogError, LogUnavailable
from kat_stream.log import (
    Committed,
    Delivered,
    Emit,
    Message,
    Outcome,
    TopicPartition,
    kafka_producer,
    open_log,
    run_work,
)
from kat_stream.log.base import Log, Member
from kat_stream.log.kafka_client import Broker
from kat_stream.log.lag import lags
from kat_stream.log.message import largest, seal
from kat_stream.log.tracker import METADATA_LIMIT, Tracker, decode_runs, output_of, with_output
from kat_stream.versions import Versions
from tests.contract.conftest import TOPICS
from tests.contract.log_records import SIZE, GroupJoin, entry, everything, groups_on_one_partition, reward
from tests.contract.test_log_kafka_members import GROUP, PLACE, Place, nothing, owned, place, polled
from tests.contract.test_stages_transform import emitted, transforming
from topics import PolicyVersion, partition_of, topic_named

__all__ = ["place"]
pytestmark = [pytest.mark.anyio, pytest.mark.kafka, pytest.mark.timeout(240)]
WAIT_S = 60.0
COUNT = 8
ENTRY_PLACE = partition_of(entry(GROUP, "any"))


async def within(what: str, ready: Callable[[], object]) -> None:
    """Until an awaitable question is answered with yes."""
    with anyio.fail_after(WAIT_S):
        while not await ready():  # type: ignore[misc]
            await anyio.sleep(0.05)
    assert what


async def ids(log: Log) -> list[str]:
    """Rollouts of all readable ledger entries."""
    return [d.record().rollout_id for d in await everything(log, "ledger")]  # type: ignore[attr-defined]


# --- groups -----------------------------------------------------------------------------------------------------------


async def test_1_3_a_hand_over_longer_than_the_session_commits_and_1_7_owns_nothing_meanwhile(place: Place) -> None:
    """aiokafka's own rebalance timeout is the session: the slow member would be out, and its commit refused."""
    log = await place.client(session_timeout_ms=1500)
    await log.publish(*[reward(number, GROUP) for number in range(COUNT)])
    seen: list[object] = []

    async def finishes_slowly(partitions: frozenset[TopicPartition]) -> None:
        if partitions:
            seen.append(a.assigned)
            await anyio.sleep(3.0)  # work in hand, twice as long as the session
            await a.commit({PLACE: Committed(3)})

    a = await log.join(["rewards"], group="z", member="a", on_revoked=finishes_slowly)
    assert len(await polled(a, 3)) == 3
    b = await place.member(await place.client(), "rewards")
    await owned(a, b, each=6)
    assert seen == [None]
    assert await log.committed("z") == {PLACE: 3}
    await a.poll(limit=1, timeout_s=0.1)  # a failed hand-over would be raised here
    await a.leave()


async def test_1_5_two_holders_of_a_static_id_do_not_flap_for_ever(place: Place) -> None:
    """Each takes the other's place, again and again, until one of them stops and names the reason."""
    said: list[str] = []

    async def live(log: Log, tasks: anyio.abc.TaskGroup) -> None:
        try:
            member = await place.member(log, "rewards", name="pod-0")
            while True:
                await member.poll(limit=1, timeout_s=0.1)
        except LogError as error:
            said.append(str(error))
            tasks.cancel_scope.cancel()

    with anyio.fail_after(WAIT_S):
        async with anyio.create_task_group() as tasks:
            for _ in range(2):
                tasks.start_soon(live, await place.client(static_member=True, session_timeout_ms=10_000), tasks)
    assert "static member pod-0" in said[0]


async def test_1_8_a_first_join_is_one_generation(place: Place) -> None:
    """Two assignors would make it two."""
    log = await place.client()
    await log.publish(reward(0, GROUP))
    member = await place.member(log, "rewards")
    await polled(member, 1)
    assert member.holder.generation == 1  # type: ignore[attr-defined]


async def test_1_9_a_member_whose_loop_was_blocked_for_longer_than_its_session_is_told_and_comes_back(
    place: Place,
) -> None:
    log = await place.client(session_timeout_ms=1000)
    await log.publish(*[reward(number, GROUP) for number in range(COUNT)])
    a = await place.member(log, "rewards")
    await polled(a, 5)
    time.sleep(3.0)  # noqa: ASYNC251  nothing of this process runs, also no heartbeat
    with pytest.raises(FencedError):
        await a.commit({PLACE: Committed(5)})
    await a.poll(limit=1, timeout_s=0.1)
    await owned(a, each=12)
    assert await log.committed("z") == {}


async def test_2_3_a_member_that_left_its_group_moves_no_place_although_the_group_is_empty(place: Place) -> None:
    """Kafka takes a commit without a member from anybody while a group has none."""
    log_a, log_b = await place.client(max_poll_interval_ms=1000), await place.client()
    await log_b.publish(*[reward(number, GROUP) for number in range(COUNT)])
    a = await place.member(log_a, "rewards")
    assert len(await polled(a, 5)) == 5

    async def empty() -> bool:
        return not any(group.members for group in await log_b.groups())

    await within("the idle member gone", empty)
    b = await place.member(log_b, "rewards")
    await polled(b, COUNT)
    await b.commit({PLACE: Committed(COUNT)})
    await b.leave()
    await within("the group empty again", empty)
    with pytest.raises(FencedError, match="left"):
        await a.commit({PLACE: Committed(5)})
    writer = await log_a.writer("sole", group="z")
    with pytest.raises(FencedError):
        await writer.commit([seal(entry("g", "zombie"))], {PLACE: Committed(5)})
    await writer.close()
    assert await log_b.committed("z") == {PLACE: COUNT} and await ids(log_b) == []


async def test_2_5_the_longest_metadata_that_we_write_is_taken_and_read_back_whole(place: Place) -> None:
    log = await place.client()
    tracker = Tracker(Committed(0))
    for offset in range(0, 40_000, 2):
        tracker.take(offset)
        tracker.take(offset + 1)
        tracker.finish(offset + 1)
    longest = with_output(tracker.commit(), 10**12)
    assert METADATA_LIMIT - 10 < len(longest.metadata) < 4096
    await log.publish(reward(0, GROUP))
    member = await place.member(log, "rewards")
    await polled(member, 1)
    await member.commit({PLACE: longest})
    found = (await log.commits("z"))[PLACE]
    assert found == longest and output_of(found) == 10**12 and len(decode_runs(found)) > 700


# --- transactions -----------------------------------------------------------------------------------------------------


def test_3_2_the_pause_between_transactions_that_we_shorten_is_the_one_that_aiokafka_uses() -> None:
    assert sender.BACKOFF_OVERRIDE == 0.002
    assert "return BACKOFF_OVERRIDE" in inspect.getsource(sender)


async def test_3_6_a_zombie_that_came_back_cannot_commit_what_it_polled_before(place: Place) -> None:
    """The generation is that of the poll: with that of the commit, one who rejoined in between would pass."""
    log_a, log_b = await place.client(), await place.client()
    await log_a.publish(*[reward(number, GROUP) for number in range(COUNT)])
    a = await place.member(log_a, "rewards")
    await polled(a, 5)
    b = await place.member(log_b, "rewards")
    await owned(a, b, each=6)
    await polled(b, COUNT)
    await b.commit({PLACE: Committed(COUNT)})
    await b.leave()
    await owned(a, each=12)
    writer = await log_a.writer("zombie", group="z")
    with pytest.raises(FencedError, match="does not hold"):
        await writer.commit([seal(entry("g", "late"))], {PLACE: Committed(5)})
    await writer.close()
    assert await log_b.commits("z") == {PLACE: Committed(COUNT)} and await ids(log_b) == []
    await a.poll(limit=1, timeout_s=0.1)
    writer = await log_a.writer("zombie", group="z")
    await writer.commit([seal(entry("g", "now"))], {PLACE: Committed(COUNT)})
    await writer.close()
    assert await ids(log_b) == ["now"]


async def test_3_9_a_stage_whose_transaction_the_broker_timed_out_opens_a_new_writer_and_goes_on(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log, groups = await place.client(), groups_on_one_partition(4)
    await log.publish(*[reward(n * SIZE + i, group) for n, group in enumerate(groups) for i in range(SIZE)])
    send, timed_out = kafka_producer._send, anyio.Event()
    monkeypatch.setattr(kafka_producer, "TRANSACTION_TIMEOUT_MS", 1000)

    async def stands_still_once(producer: AIOKafkaProducer, broker: Broker, messages: list[Message]) -> None:
        await send(producer, broker, messages)
        if messages[0].topic == "ledger" and not timed_out.is_set():
            monkeypatch.setattr(kafka_producer, "TRANSACTION_TIMEOUT_MS", 45_000)
            await within("the broker's abort", aborted)
            timed_out.set()

    async def aborted() -> bool:
        """Readers get past the open transaction only once it has ended."""
        return any((await log.end_offsets("ledger")).values())

    monkeypatch.setattr(kafka_producer, "_send", stands_still_once)
    with caplog.at_level(logging.WARNING):
        async with transforming(await place.client(), GroupJoin(), batch=SIZE):
            await within("all groups", lambda: _emitted(log, len(groups)))
    assert timed_out.is_set() and "is opened anew" in caplog.text and "ProducerFenced" in caplog.text
    assert await emitted(log) == Counter(groups)


async def _emitted(log: Log, count: int) -> bool:
    return (await emitted(log)).total() >= count


async def test_3_10_a_cancelled_commit_is_whole_before_the_cancellation_goes_on(place: Place) -> None:
    log = await place.client()
    writer = await log.writer("c", group="z")
    for number in range(12):
        with anyio.move_on_after(0.0005 * number) as cut:
            await writer.commit([seal(entry("g", str(number)))], {PLACE: Committed(number + 1)})
        assert await log.commits("z") == {PLACE: Committed(number + 1)}, f"cut off: {cut.cancelled_caught}"
    await writer.close()
    assert await ids(log) == [str(number) for number in range(12)]


async def test_6_2_the_next_holder_of_an_id_frees_readers_from_a_dead_ones_transaction(place: Place) -> None:
    log = await place.client()
    dead = place.unbound("w")
    await dead.start()
    await dead._producer.begin_transaction()
    await kafka_producer._send(dead._producer, Broker(place.bootstrap, place.prefix), [seal(entry(GROUP, "lost"))])
    await log.publish(entry(GROUP, "after"))
    assert await ids(log) == []
    heir = await log.writer("w", group="z")
    assert await ids(log) == ["after"]
    await heir.close()
    await dead.close()


# --- records and tables -----------------------------------------------------------------------------------------------


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


# --- administration ---------------------------------------------------------------------------------------------------


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
        await within("no lag", no_lag)
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
        await within("what is left", done)
        stopping.set()
    assert taken == [3, 4] and "rewards[11]: 2 messages expired unread" in caplog.text


# --- the door ---------------------------------------------------------------------------------------------------------


async def test_10_4_tls_at_a_plaintext_port_is_said(kafka_bootstrap: str) -> None:
    """The broker just closes the connection, and aiokafka says `Unable to bootstrap` whatever is wrong."""
    log = open_log(f"kafka:{kafka_bootstrap}", security=SecuritySection(protocol="SSL"))
    with pytest.raises(LogUnavailable, match=f"no Kafka answers at {kafka_bootstrap} with protocol SSL"):
        await log.start()
