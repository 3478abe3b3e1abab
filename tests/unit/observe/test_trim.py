"""What `topics trim` plans, on the in-memory log; tests/contract/test_retention.py does it on a broker."""

from __future__ import annotations

import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio
import msgspec
import pytest

from kat_stream.archive import ArchiveWriter
from kat_stream.config import Config, dump
from kat_stream.log import Committed, MemoryLog, TopicPartition
from kat_stream.observe.ledger import Ledger
from kat_stream.observe.sources import LOG_ID, LogSource, read_ledger
from kat_stream.retention import plan
from tests import observe_kit as fab
from tests.contract.log_records import nothing
from topics import CATALOGUE, Record

pytestmark = pytest.mark.anyio


def run_folder(parent: Path, name: str) -> Path:
    directory, config = parent / name, Config()
    directory.mkdir()
    config = msgspec.structs.replace(
        config,
        run=msgspec.structs.replace(config.run, name=name),
        log=msgspec.structs.replace(config.log, url="kafka:here:1"),
    )
    (directory / "config.toml").write_text(dump(config))
    return directory


def in_flight(run: str, number: int) -> list[Record]:
    """A rollout of which two turns are on the log and no end."""
    asked = fab.request(f"{run}-t{number:06d}", 0, 1)
    return [msgspec.structs.replace(record, run=run) for record in (asked, *fab.turns(asked))]


async def archive(log: MemoryLog, run_dir: Path) -> None:
    """Everything up to now."""
    shutil.rmtree(run_dir / "archive", ignore_errors=True)
    writer = ArchiveWriter(run_dir / "archive", run=run_dir.name, log_id=LOG_ID)
    async with log.follow([topic.name for topic in CATALOGUE]) as follower:
        async for delivered in follower.catch_up():
            writer.add(delivered)
    writer.flush()


async def commit_all(log: MemoryLog, run: str) -> None:
    """A group of the run that has read all trajectories."""
    member = await log.join(["trajectories"], group=f"{run}.packer", member="one", on_revoked=nothing)
    with anyio.fail_after(10):
        while not member.assigned:
            await member.poll(limit=1, timeout_s=0.1)
    ends = await log.end_offsets("trajectories")
    await member.commit({TopicPartition("trajectories", number): Committed(end) for number, end in ends.items()})


async def filled() -> MemoryLog:
    log = MemoryLog()
    await log.apply_topics(CATALOGUE)
    return log


def account_from(log: MemoryLog) -> Callable[[Path], Awaitable[Ledger]]:
    return lambda run_dir: read_ledger(LogSource(log, "here", run_dir.name, run_dir / "archive"))


async def removed(log: MemoryLog, run_dir: Path, account: Callable[[Path], Awaitable[Ledger]]) -> int:
    trims = await plan(log, run_dir, account)
    return sum(trim.messages for trim in trims if trim.bound.place.topic == "turns")


async def test_turns_of_a_group_in_flight_stay_whichever_run_beside_it_belongs_to(tmp_path: Path) -> None:
    log, folders = await filled(), [run_folder(tmp_path, name) for name in ("a", "b")]
    await log.publish(*in_flight("b", 1))
    for run_dir in folders:
        await archive(log, run_dir)
        await commit_all(log, run_dir.name)
    assert [await removed(log, run_dir, account_from(log)) for run_dir in folders] == [0, 0]


async def test_turns_of_a_rollout_that_starts_during_the_plan_stay(tmp_path: Path) -> None:
    """The run goes on, and its archiver flushes, while its account is read."""
    log, run_dir = await filled(), run_folder(tmp_path, "a")
    await archive(log, run_dir)
    await commit_all(log, "a")
    read = account_from(log)

    async def goes_on(run_dir: Path) -> Ledger:
        before = await read(run_dir)
        await log.publish(*in_flight("a", 2))
        await archive(log, run_dir)
        return before

    assert await removed(log, run_dir, goes_on) == 0


async def test_turns_that_are_archived_and_of_no_group_in_flight_go(tmp_path: Path) -> None:
    log, run_dir = await filled(), run_folder(tmp_path, "a")
    asked = fab.request("a-t000001", 0, 1)
    await log.publish(*(msgspec.structs.replace(r, run="a") for r in (asked, *fab.turns(asked), fab.trajectory(asked))))
    await archive(log, run_dir)
    await commit_all(log, "a")
    assert await removed(log, run_dir, account_from(log)) == 2
