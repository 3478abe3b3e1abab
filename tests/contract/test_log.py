"""What both logs promise to writers and readers: acknowledged, routed, in order, readable by header, typed errors."""

from __future__ import annotations

from dataclasses import replace

import anyio
import msgspec
import pytest

from kat_stream.errors import DataError, DecodeError, LogError
from kat_stream.log import Log, Message
from kat_stream.log.trace import trace_id_of
from tests.contract.conftest import TOPICS, Connect
from tests.contract.log_records import entry, everything, groups_on_one_partition, reward
from topics import Reward, partition_of
from topics.catalogue import topic_named

pytestmark = pytest.mark.anyio


async def test_topics_are_created_once_and_another_partition_count_is_refused(log: Log) -> None:
    assert await log.apply_topics([*TOPICS, topic_named("scores")]) == ["scores"]
    assert await log.apply_topics(TOPICS) == []
    assert (await log.topics())["rewards"] == topic_named("rewards").partitions
    with pytest.raises(LogError, match="scores"):
        await log.apply_topics([replace(topic_named("scores"), partitions=5)])


async def test_what_was_published_is_read_as_it_was(log: Log) -> None:
    sent = [reward(number, f"g{number % 5}") for number in range(50)]
    await log.publish(*sent)
    got = await everything(log, "rewards")
    assert sorted(d.record().score for d in got) == list(range(50))  # type: ignore[attr-defined]
    for delivered in got:
        record = delivered.record()
        assert delivered.position.partition == partition_of(record)
        assert delivered.key == record.group_id.encode()  # type: ignore[attr-defined]
        assert delivered.headers["record"] == b"Reward/1"
        assert delivered.headers["traceparent"].split(b"-")[1].decode() == trace_id_of(record.rollout_id)  # type: ignore[attr-defined]
        assert delivered.timestamp_ms > 1_600_000_000_000


async def test_order_is_kept_per_partition_under_concurrent_writers(log: Log) -> None:
    groups = groups_on_one_partition(4)

    async def write(group: str) -> None:
        for number in range(0, 60, 3):
            await log.publish(*[reward(number + i, group) for i in range(3)])

    async with anyio.create_task_group() as tasks:
        for group in groups:
            tasks.start_soon(write, group)
    got = [d.record() for d in await everything(log, "rewards")]
    for group in groups:
        assert [r.score for r in got if r.group_id == group] == list(range(60))  # type: ignore[attr-defined]


async def test_followers_start_where_they_are_told(log: Log) -> None:
    await log.publish(*[reward(number) for number in range(10)])
    number = partition_of(reward(0))
    async with (
        log.follow(["rewards"], start="latest") as latest,
        log.follow(["rewards"], start={("rewards", number): 7}, partitions=[number]) as seventh,
    ):
        await log.publish(reward(10))
        with anyio.fail_after(20):
            assert (await anext(latest)).record().score == 10  # type: ignore[attr-defined]
            assert [(await anext(seventh)).record().score for _ in range(4)] == [7, 8, 9, 10]  # type: ignore[attr-defined]
        assert seventh.position() == {("rewards", number): 11}
        assert await latest.caught_up()


async def test_catch_up_ends_at_the_offsets_of_the_call_also_on_empty_topics(log: Log) -> None:
    assert await everything(log, "rewards", "ledger") == []
    await log.publish(reward(0), entry("g", "a"))
    async with log.follow(["rewards", "ledger"]) as follower:
        assert not await follower.caught_up()
        assert len([delivered async for delivered in follower.catch_up()]) == 2
        assert await follower.caught_up()
        await log.publish(reward(1))
        assert not await follower.caught_up()
        assert [d.record().score async for d in follower.catch_up()] == [1]  # type: ignore[attr-defined]


async def test_an_offset_that_is_not_there_is_an_error(log: Log) -> None:
    await log.publish(reward(0))
    with pytest.raises(LogError, match="rewards"):
        async with log.follow(["rewards"], start={("rewards", partition_of(reward(0))): 99}) as follower:
            with anyio.fail_after(20):
                await anext(follower)


async def test_offsets_count_messages(log: Log) -> None:
    await log.publish(*[reward(number) for number in range(3)])
    number = partition_of(reward(0))
    ends = await log.end_offsets("rewards")
    assert ends[number] == 3 and sum(ends.values()) == 3
    assert set((await log.beginning_offsets("rewards")).values()) == {0}
    assert await log.committed("nobody") == {}


async def test_a_clear_error_for_what_cannot_be_published(log: Log) -> None:
    with pytest.raises(LogError, match=r"policy\.versions"):
        await log.append(Message("policy.versions", 0, b"k", b"v", {}))
    with pytest.raises(DataError, match="rewards"):
        await log.publish(long("x" * (17 << 20)))
    with pytest.raises(DataError, match="key"):
        await log.append(Message("ledger", 0, None, b"v", {}))
    await log.publish(long("x" * (12 << 20)))
    assert len(await everything(log, "rewards")) == 1


def long(evidence: str) -> Reward:
    return msgspec.structs.replace(reward(0), evidence=evidence)


async def test_bytes_that_are_no_record_say_what_and_where(log: Log) -> None:
    bad = [
        Message("rewards", 2, b"k", b"\xc1garbage", {"record": b"Reward/1"}),
        Message("rewards", 2, b"k", b"\x80", {"record": b"Reward/1"}),
        Message("rewards", 2, b"k", b"\x80", {"record": b"Reward/99"}),
        Message("rewards", 2, b"k", b"\x80", {}),
    ]
    await log.append(*bad)
    expected = ["Reward/1", "field", "Reward/99", "header"]
    got = await everything(log, "rewards")
    assert [delivered.value for delivered in got] == [message.value for message in bad]
    for delivered, words in zip(got, expected, strict=True):
        with pytest.raises(DecodeError, match=words) as error:
            delivered.record()
        assert str(delivered.position) in str(error.value)


async def test_a_cancelled_read_loses_nothing(log: Log) -> None:
    got: list[float] = []
    async with log.follow(["rewards"]) as follower, anyio.create_task_group() as tasks:

        async def write() -> None:
            for number in range(30):
                await log.publish(reward(number))
                await anyio.sleep(0.003)

        with anyio.move_on_after(0.004) as nothing_there:
            await anext(follower)
        assert nothing_there.cancelled_caught
        tasks.start_soon(write)
        with anyio.fail_after(30):
            while len(got) < 30:
                with anyio.move_on_after(0.004):
                    delivered = await anext(follower)
                    got.append(delivered.record().score)  # type: ignore[attr-defined]
    assert got == list(range(30))


async def test_another_client_reads_what_the_first_one_wrote(connect: Connect) -> None:
    one, two = await connect(), await connect()
    await one.publish(reward(5))
    assert [d.record() for d in await everything(two, "rewards")] == [reward(5)]
