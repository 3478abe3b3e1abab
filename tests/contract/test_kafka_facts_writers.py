"""Traps of transactions on a real Kafka, each closed, named by its point (kafka_kit.py): whole, once, and fenced."""

from __future__ import annotations

import inspect
import logging
from collections import Counter

import anyio
import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.producer import sender

from kat_stream.errors import FencedError
from kat_stream.log import (
    Committed,
    Message,
    kafka_producer,
)
from kat_stream.log.kafka_client import Broker
from kat_stream.log.message import seal
from tests.contract.kafka_kit import GROUP, PLACE, Place, ids, owned, place, polled
from tests.contract.log_records import SIZE, GroupJoin, entry, groups_on_one_partition, reward, until_written
from tests.contract.stages_kit import emitted, transforming
from tests.waiting import until

__all__ = ["place"]
pytestmark = [pytest.mark.anyio, pytest.mark.kafka, pytest.mark.timeout(240)]
COUNT = 8


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
            await until(aborted, "the broker's abort")
            timed_out.set()

    async def aborted() -> bool:
        """Readers get past the open transaction only once it has ended."""
        return any((await log.end_offsets("ledger")).values())

    monkeypatch.setattr(kafka_producer, "_send", stands_still_once)
    with caplog.at_level(logging.WARNING):
        async with transforming(await place.client(), GroupJoin(), batch=SIZE):
            await until_written(log, "ledger", len(groups))
    assert timed_out.is_set() and "is opened anew" in caplog.text and "ProducerFenced" in caplog.text
    assert await emitted(log) == Counter(groups)


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
