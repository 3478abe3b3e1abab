"""`run_transform` on both logs: all or nothing, each group emitted once whatever crashes, zombies are fenced."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import anyio
import pytest

from kat_stream.errors import FencedError, LogUnavailable
from kat_stream.log import (
    Committed,
    Log,
    Message,
    TopicPartition,
    run_transform,
)
from kat_stream.log.message import seal
from tests.contract.conftest import Connect
from tests.contract.log_records import (
    SIZE,
    GroupJoin,
    entry,
    everything,
    groups_on_one_partition,
    reward,
    until_written,
)
from tests.contract.stages_kit import emitted, transforming
from tests.waiting import until
from topics import LedgerEntry, Reward, partition_of

pytestmark = pytest.mark.anyio


def interleaved(groups: Sequence[str], dice: random.Random) -> list[Reward]:
    """SIZE rewards of each group, the groups mixed: they complete out of order."""
    records = [reward(index * SIZE + i, group) for index, group in enumerate(groups) for i in range(SIZE)]
    dice.shuffle(records)
    return records


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_no_group_is_lost_or_emitted_twice_whatever_crashes(connect: Connect, seed: int) -> None:
    log, dice = await connect(), random.Random(seed)
    groups = groups_on_one_partition(8) + ["elsewhere", "there"]
    await log.publish(*interleaved(groups, dice))
    lives = 0

    def dies_sometimes(record: Reward) -> None:
        if dice.random() < 0.25:
            raise RuntimeError("the process dies here")

    while (await emitted(log)).total() < len(groups):
        lives += 1
        assert lives < 60
        handler = GroupJoin(dies_sometimes if lives < 12 else lambda record: None)
        try:
            async with transforming(await connect(), handler, batch=dice.randrange(1, 6)):
                await until_written(log, "ledger", len(groups))
        except* RuntimeError:
            pass
    assert lives > 1
    assert await emitted(log) == Counter(groups)


async def test_a_crash_leaves_nothing_of_its_batch_visible(log: Log) -> None:
    group = groups_on_one_partition(1)[0]
    await log.publish(*[reward(number, group) for number in range(SIZE + 1)])

    def dies_at_the_last(record: Reward) -> None:
        if record.score == SIZE:
            raise RuntimeError("after the group was emitted")

    with pytest.raises(RuntimeError, match="after the group"):
        await run_transform(
            log, ["rewards"], group="t", member="m", handler=GroupJoin(dies_at_the_last), stopping=anyio.Event()
        )
    assert await everything(log, "ledger") == []
    assert sum((await log.committed("t")).values()) == 0


async def test_the_committed_place_is_the_low_watermark_and_finished_messages_are_not_read_again(log: Log) -> None:
    early, late = groups_on_one_partition(2)
    number = partition_of(reward(0, early))
    await log.publish(reward(0, early), *[reward(1 + i, late) for i in range(SIZE)], reward(9, early))
    async with transforming(log, GroupJoin()):
        await until_written(log, "ledger", 1)
    assert (await log.committed("t"))["rewards", number] == 0  # type: ignore[index]
    again = GroupJoin()
    async with transforming(log, again):
        await log.publish(reward(10, early))
        await until_written(log, "ledger", 2)
    assert again.handled == [0, 9, 10]
    assert (await log.committed("t"))["rewards", number] == 6  # type: ignore[index]
    assert await emitted(log) == Counter([early, late])


async def test_members_come_and_go_and_each_group_is_emitted_once(connect: Connect) -> None:
    log, dice = await connect(), random.Random(7)
    groups = [f"g{number}" for number in range(60)]
    records = interleaved(groups, dice)
    first, second = GroupJoin(), GroupJoin()
    async with transforming(await connect(), first, "a", batch=7):
        await log.publish(*records[:60])
        await until(lambda: len(first.handled) > 20)
        async with transforming(await connect(), second, "b", batch=7):
            await log.publish(*records[60:120])
            await until(lambda: len(second.handled) > 5)
        await log.publish(*records[120:])
        await until_written(log, "ledger", len(groups))
    assert await emitted(log) == Counter(groups)


async def test_a_bad_message_is_a_dead_letter_of_the_same_transaction(log: Log) -> None:
    group = groups_on_one_partition(1)[0]
    number = partition_of(reward(0, group))
    await log.append(Message("rewards", number, b"k", b"\xc1", {"record": b"Reward/1"}))
    await log.publish(*[reward(i, group) for i in range(SIZE)])
    async with transforming(log, GroupJoin()):
        await until_written(log, "ledger", 1)
    (letter,) = await everything(log, "dead.letters")
    assert letter.record().value == b"\xc1"  # type: ignore[attr-defined]
    assert (await log.committed("t"))["rewards", number] == SIZE + 1  # type: ignore[index]


async def test_a_writer_is_fenced_by_the_next_one_with_its_id(connect: Connect) -> None:
    log = await connect()
    await log.publish(reward(0))
    place = TopicPartition("rewards", partition_of(reward(0)))
    zombie = await (await connect()).writer("t.rewards.0", group="t")
    await zombie.commit([seal(entry("g", "before"))], {place: Committed(1)})
    owner = await (await connect()).writer("t.rewards.0", group="t")
    assert await log.committed("t") == {place: 1}
    await owner.commit([seal(entry("g", "owner"))], {place: Committed(5, "r1:1,2")})
    with pytest.raises(FencedError):
        await zombie.commit([seal(entry("g", "zombie"))], {place: Committed(2)})
    with pytest.raises((FencedError, LogUnavailable)):
        await zombie.commit([seal(entry("g", "zombie"))], {place: Committed(2)})
    await zombie.close()
    await owner.close()
    written = [d.record() for d in await everything(log, "ledger")]
    assert [record.rollout_id for record in written if isinstance(record, LedgerEntry)] == ["before", "owner"]
    assert await log.commits("t") == {place: Committed(5, "r1:1,2")}
