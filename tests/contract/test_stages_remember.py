"""What a transform reads back after a restart does not grow with the history of its topic, on both logs."""

from __future__ import annotations

from collections import Counter

import anyio
import pytest

from kat_stream.log import Log
from kat_stream.log.remembered import KEEP, STRIDE
from kat_stream.log.tracker import output_of
from tests.contract.log_records import SIZE, GroupJoin, entry, eventually, everything, reward
from tests.contract.test_stages_transform import transforming
from topics import partition_of

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(280)]
BATCH = 300


class Counting(GroupJoin):
    """Knows how many messages it was given to remember."""

    def assigned(self, partition, replay) -> None:  # type: ignore[no-untyped-def]
        self.read_back = getattr(self, "read_back", 0) + len(replay)
        super().assigned(partition, replay)


def on_partition_0(count: int, skip: int = 0) -> list[str]:
    names = (f"g{number}" for number in range(20 * (skip + count)))
    found = [name for name in names if partition_of(reward(0, name)) == 0]
    return found[skip : skip + count]


async def publish_groups(log: Log, groups: list[str]) -> None:
    records = [reward(i, group) for group in groups for i in range(SIZE)]
    for start in range(0, len(records), 600):
        await log.publish(*records[start : start + 600])


async def run_over(log: Log, groups: list[str]) -> Counting:
    """A life of the stage that handles these groups."""
    await publish_groups(log, groups)
    handler = Counting()
    async with transforming(log, handler, batch=BATCH):
        await eventually(lambda: groups[-1] in handler.emitted.get(0, set()))
        with anyio.fail_after(60):
            end = (await log.end_offsets("rewards"))[0]
            while (await log.committed("t")).get(("rewards", 0), 0) < end:  # type: ignore[call-overload]
                await anyio.sleep(0.05)
    return handler


async def test_after_5000_groups_a_restart_reads_back_a_few_hundred_records(log: Log) -> None:
    await run_over(log, on_partition_0(500))
    early = await run_over(log, on_partition_0(10, skip=500))
    await run_over(log, on_partition_0(4490, skip=510))
    late = await run_over(log, on_partition_0(10, skip=5000))
    bound = KEEP + STRIDE + 2 * BATCH // SIZE
    assert 0 < early.read_back <= bound
    assert 0 < late.read_back <= bound
    last = await run_over(log, on_partition_0(10, skip=5010))
    assert last.read_back <= bound, "restarts one after the other do not pile up what is read back"
    groups = Counter(d.record().group_id for d in await everything(log, "ledger"))  # type: ignore[attr-defined]
    assert groups == Counter(on_partition_0(5020))


async def test_what_an_open_group_may_still_need_is_read_back_however_much_that_is(log: Log) -> None:
    waiting, *others = on_partition_0(1 + 2 * KEEP)
    await log.publish(reward(0, waiting))
    await publish_groups(log, others)
    first = Counting()
    async with transforming(log, first, batch=50):
        await eventually(lambda: others[-1] in first.emitted.get(0, set()))
    place = (await log.commits("t"))["rewards", 0]  # type: ignore[index]
    assert (place.offset, output_of(place)) == (0, 0)
    second = Counting()
    async with transforming(log, second, batch=50):
        await log.publish(reward(1, waiting), reward(2, waiting))
        await eventually(lambda: waiting in second.emitted.get(0, set()))
    assert second.read_back == len(others)
    written = [d.record() for d in await everything(log, "ledger")]
    assert Counter(written_entry.group_id for written_entry in written) == Counter([waiting, *others])  # type: ignore[attr-defined]
    assert entry(waiting, waiting) in written
