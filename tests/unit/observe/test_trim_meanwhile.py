"""A view that reads a run while `topics trim` runs: what is gone from the log is in the archive by then."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import pytest

from kat_stream.archive import ArchiveWriter
from kat_stream.errors import LogError
from kat_stream.log import Delivered, Follower, MemoryLog, memory
from kat_stream.log.base import Start
from kat_stream.observe.ledger import Ledger
from kat_stream.observe.sources import LOG_ID, LogSource, read_ledger
from kat_stream.replay.groups import groups_of
from kat_stream.retention import TRIMMED
from tests import observe_kit as fab
from topics import CATALOGUE, PackedBatch, TrainStep

pytestmark = pytest.mark.anyio
NAMES = [topic.name for topic in CATALOGUE]


async def everything(log: MemoryLog) -> list[Delivered]:
    async with log.follow(NAMES) as follower:
        return [delivered async for delivered in follower.catch_up()]


def trimmed(log: MemoryLog) -> None:
    for topic in TRIMMED:
        for partition in log.partitions(topic):
            partition.trim(0, 0, partition.end)


async def half_archived(log: MemoryLog, directory: Path) -> Callable[[], None]:
    """A run of which the archive has one half; what archives the other and trims the log."""
    await log.apply_topics(CATALOGUE)
    writer = ArchiveWriter(directory, run=fab.RUN, log_id=LOG_ID)
    records = [record for record, _ in fab.small().records]
    half = len(records) // 2
    for some, flush in ((records[:half], True), (records[half:], False)):
        await log.publish(*some)
        for delivered in await everything(log):
            writer.add(delivered)
        if flush:
            writer.flush()

    def trim() -> None:
        writer.flush()
        trimmed(log)

    return trim


@pytest.fixture(autouse=True)
def one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A follower takes no more ahead: what is trimmed is missing at once."""
    monkeypatch.setattr(memory, "FETCH", 1)


@pytest.mark.parametrize("share", [0.1, 0.6], ids=["while the archive is read", "while the log is read"])
async def test_every_message_comes_once_and_in_order(tmp_path: Path, share: float) -> None:
    log = MemoryLog()
    trim = await half_archived(log, tmp_path)
    there = [delivered.position for delivered in await everything(log)]
    got: dict[tuple[str, int], list[int]] = defaultdict(list)
    async for delivered in LogSource(log, "here", fab.RUN, tmp_path).messages():
        got[delivered.position.topic_partition].append(delivered.position.offset)
        if sum(map(len, got.values())) == int(share * len(there)):
            trim()
    assert all(partition.begin == partition.end for partition in log.partitions("turns"))
    expected: dict[tuple[str, int], list[int]] = defaultdict(list)
    for position in sorted(there):
        expected[position.topic_partition].append(position.offset)
    assert got == expected


@pytest.mark.parametrize("after", [1, 30], ids=["while the archive is read", "later"])
async def test_the_account_stays_exact(tmp_path: Path, after: int) -> None:
    log = MemoryLog()
    trim = await half_archived(log, tmp_path)
    source = LogSource(log, "here", fab.RUN, tmp_path)
    expected, account, heads = await read_ledger(source), Ledger(), 0
    async for head in source.heads():
        account.apply(head)
        heads += 1
        if heads == after:
            trim()
    assert (account.fates(), account.check()) == (expected.fates(), expected.check())


class TrimmedWhenFollowed(MemoryLog):
    """Between the decision to read from a place and the reading."""

    trim: Callable[[], None] = staticmethod(lambda: None)

    def follow(
        self,
        topics: Sequence[str],
        *,
        start: Start = "earliest",
        partitions: Sequence[int] | None = None,
        poll_s: float = 0.2,
    ) -> Follower:
        self.trim()
        return super().follow(topics, start=start, partitions=partitions, poll_s=poll_s)


async def test_a_step_is_replayed_though_its_groups_are_trimmed_meanwhile(tmp_path: Path) -> None:
    log = TrimmedWhenFollowed()
    trim = await half_archived(log, tmp_path)
    messages = await everything(log)
    places = {
        delivered.record().group_id: (delivered.position.partition, delivered.position.offset)  # type: ignore[attr-defined]
        for delivered in messages
        if isinstance(delivered.record(), PackedBatch)
    }
    step = next(record for delivered in messages if isinstance(record := delivered.record(), TrainStep))
    step = msgspec.structs.replace(step, batches=tuple(places[group] for group in step.groups))
    log.trim = trim
    found = await groups_of(LogSource(log, "here", fab.RUN, tmp_path), [step])
    assert [group.group_id for group in found[0]] == list(step.groups)


async def test_what_is_trimmed_and_not_archived_is_an_error(tmp_path: Path) -> None:
    log = MemoryLog()
    await half_archived(log, tmp_path)
    with pytest.raises(LogError, match="no offset"):
        async for _ in LogSource(log, "here", fab.RUN).messages(("turns",)):
            trimmed(log)
