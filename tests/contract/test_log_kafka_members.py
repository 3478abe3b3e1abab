"""Members and writers on a real broker, where aiokafka leaves holes: zombies, dead loops, poisoned producers."""

from __future__ import annotations

import anyio
import pytest
from aiokafka.errors import ProducerFenced

from kat_stream.errors import FencedError, LogError, LogUnavailable
from kat_stream.log import Committed, Delivered, Emit, Message, Outcome, kafka_producer, run_work, work
from kat_stream.log.kafka_client import Broker
from kat_stream.log.message import seal
from tests.contract.kafka_kit import GROUP, PLACE, WAIT_S, Place, ids, owned, place, polled
from tests.contract.log_records import entry, everything, reward, until_committed, until_written
from tests.waiting import until
from topics import partition_of

__all__ = ["place"]
pytestmark = [pytest.mark.anyio, pytest.mark.kafka, pytest.mark.timeout(180)]
COUNT = 8


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
        await until(lambda: handled)
        before = await log.groups()

        async def noticed() -> bool:
            return await log.groups() != before

        with anyio.move_on_after(6.0):  # three poll intervals
            await until(noticed)
            pytest.fail("the member left its group")
        release.set()
        await until_committed(log, "z", "rewards")
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
    await until_written(log, "ledger", 1)  # readers stand at the open transaction until the broker aborts it
    with pytest.raises(ProducerFenced):
        await writer._producer.commit_transaction()
    await writer.close()
    again = await log.writer("slow", group="z")
    await again.commit([seal(entry("g", "again"))], {})
    await again.close()
    assert await ids(log) == ["after", "again"]


async def test_closing_in_an_open_transaction_frees_the_readers(place: Place) -> None:
    log = await place.client()
    writer = await log.writer("torn", group="z")
    bad = Message("ledger", 0, None, b"v", {})
    with pytest.raises((LogError, LogUnavailable)):
        await writer.commit([seal(entry("g", "torn")), bad], {})
    await writer.close()
    await log.publish(entry("g", "after"))
    assert await ids(log) == ["after"]


async def test_a_static_member_comes_back_to_its_partitions_unnoticed(place: Place) -> None:
    first = await place.member(await place.client(static_member=True), "rewards", name="pod-0")
    second = await place.member(await place.client(static_member=True), "rewards", name="pod-1")
    before = await owned(first, second, each=6)
    epoch = second.epoch
    await first.leave()
    back = await place.member(await place.client(static_member=True), "rewards", name="pod-0")
    (mine,) = await owned(back, each=6)
    assert mine == before[0] and second.epoch == epoch
