"""What a transform wrote is known for ever, on both logs; what others wrote before its first output is not read."""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec
import pytest
from aiokafka import AIOKafkaProducer

from kat_stream.log import Delivered, Log
from kat_stream.log.kafka import KafkaLog
from kat_stream.log.tracker import output_of
from tests.contract.log_records import SIZE, GroupJoin, entry, everything, reward, until_committed
from tests.contract.stages_kit import reset, transforming
from tests.waiting import until
from topics import partition_of

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(280)]
BEFORE = 300
"""Records of another run on the stage's own topic, in one partition."""


class Counting(GroupJoin):
    """Knows how many messages it was given to remember, and how many of the topic it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.read_back, self.shown = 0, 0

    def assigned(self, partition, replay) -> None:  # type: ignore[no-untyped-def]
        self.read_back += len(replay)
        super().assigned(partition, replay)

    def mine(self, delivered: Delivered) -> bool:
        self.shown += 1
        return delivered.record().run == "r"


def on_partition_0(count: int) -> list[str]:
    names = (f"g{number}" for number in range(40 * count))
    return [name for name in names if partition_of(reward(0, name)) == 0][:count]


async def publish_groups(log: Log, groups: list[str]) -> None:
    await log.publish(*[reward(i, group) for group in groups for i in range(SIZE)])


async def life(log: Log, last: str) -> Counting:
    """A life of the stage, until it has written the group `last`."""
    handler = Counting()
    async with transforming(log, handler, batch=50, mine=handler.mine):
        await until(lambda: last in handler.emitted.get(0, set()))
        await until_committed(log, "t", "rewards")
    return handler


async def words(log: Log) -> Counter[str]:
    records = [d.record() for d in await everything(log, "ledger")]
    return Counter(record.group_id for record in records if record.run == "r")  # type: ignore[attr-defined]


async def test_every_group_is_known_whatever_place_an_operator_sets(log: Log) -> None:
    """The topic holds another run's records: they are read once, by the first life."""
    groups = on_partition_0(120)
    await log.publish(*[msgspec.structs.replace(entry(groups[0], f"o{n}"), run="other") for n in range(BEFORE)])
    await publish_groups(log, groups[:60])
    first = await life(log, groups[59])
    assert first.read_back == 0 and first.shown == BEFORE
    await publish_groups(log, groups[60:])
    second = await life(log, groups[-1])
    assert second.read_back == 60 and second.shown == 60
    place = (await log.commits("t"))["rewards", 0]  # type: ignore[index]
    assert output_of(place) == BEFORE
    await reset(log, "t", "rewards")
    last = on_partition_0(121)[-1]
    await publish_groups(log, [last, groups[0]])
    third = await life(log, last)
    assert third.read_back == 120 and third.shown == BEFORE + 120
    assert await words(log) == Counter([*groups, last])


class Looking:
    """A log that counts how often somebody asked where the stage's own topic ends."""

    def __init__(self, log: Log) -> None:
        self.log, self.looks = log, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.log, name)

    async def end_offsets(self, topic: str) -> dict[int, int]:
        self.looks += topic == "ledger"
        return await self.log.end_offsets(topic)


@pytest.mark.parametrize("connect", [pytest.param("kafka", marks=pytest.mark.kafka)], indirect=True)
async def test_what_an_open_transaction_of_others_hides_is_waited_for(log: Log) -> None:
    """Another run's writer stands still in mid-transaction on the stage's own topic: what came after cannot be read."""
    assert isinstance(log, KafkaLog)
    broker, groups = log._broker, on_partition_0(5)
    other = AIOKafkaProducer(**broker.options(), transactional_id=f"{broker.prefix}other")
    await other.start()
    try:
        first = Counting()
        async with transforming(log, first, mine=first.mine):
            await until(lambda: 0 in first.emitted)
            await other.begin_transaction()
            await other.send_and_wait(broker.named("ledger"), b"open", key=b"k", partition=0)
            await publish_groups(log, groups[:4])
            await until(lambda: groups[3] in first.emitted[0])
            await until_committed(log, "t", "rewards")
        await reset(log, "t", "rewards")
        await publish_groups(log, groups[4:])
        looking, handler = Looking(log), Counting()
        async with transforming(looking, handler, mine=handler.mine):  # type: ignore[arg-type]
            await until(lambda: looking.looks >= 2 or bool(handler.emitted))
            assert not handler.emitted
            await other.abort_transaction()
            await until(lambda: groups[4] in handler.emitted.get(0, set()))
    finally:
        await other.stop()
    assert await words(log) == Counter(groups)
