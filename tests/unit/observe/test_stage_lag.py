"""Lag by stage: the groups of the run, the trainer by its steps, the archiver by its files; other runs do not count."""

from __future__ import annotations

from pathlib import Path

import anyio
import msgspec
import pytest

from kat_stream.archive import ArchiveWriter
from kat_stream.config import load
from kat_stream.errors import LogUnavailable
from kat_stream.log import Committed, Group, MemoryLog, TopicPartition
from kat_stream.observe.lag_export import export_lag
from kat_stream.observe.stage_lag import stage_lags
from kat_stream.service import Context
from kat_stream.telemetry import LAG_READ
from tests.contract.log_records import nothing
from tests.observe_kit import small
from topics import CATALOGUE, PackedBatch, TrainStep

pytestmark = pytest.mark.anyio


async def filled() -> MemoryLog:
    log = MemoryLog()
    await log.apply_topics(CATALOGUE)
    await log.publish(*(record for record, _ in small().records))
    return log


class Away(MemoryLog):
    async def groups(self) -> list[Group]:
        raise LogUnavailable("away")


async def test_a_log_that_is_away_leaves_the_time_of_the_last_reading(tmp_path: Path) -> None:
    log = await filled()
    config = load(None, [f"run.directory='{tmp_path}'", "run.name=demo"])
    (tmp_path / "demo").mkdir()
    ctx = Context(config=config, run="demo", run_dir=tmp_path / "demo", log=log, member="lag")
    LAG_READ.set(0)
    for one, known in ((Away(), False), (log, True)):
        ctx.log, ctx.stopping = one, anyio.Event()
        async with anyio.create_task_group() as group:
            group.start_soon(export_lag, ctx)
            await anyio.wait_all_tasks_blocked()
            ctx.stopping.set()
        assert (LAG_READ._value.get() > 0) == known


async def test_the_trainer_is_behind_by_what_its_newest_step_left(tmp_path: Path) -> None:
    log = await filled()
    batches = [record for record, _ in small().records if isinstance(record, PackedBatch)]
    (lag,) = [lag for lag in await stage_lags(log, "demo", None) if lag.group == "trainer"]
    newest = [r for r, _ in small().records if isinstance(r, TrainStep)][-1]
    ends = await log.end_offsets("batches")
    done = {str(number): end for number, end in ends.items()}
    await log.publish(msgspec.structs.replace(newest, step=newest.step + 1, positions=done))
    (lag,) = [lag for lag in await stage_lags(log, "demo", None) if lag.group == "trainer"]
    assert (lag.topic, lag.messages, lag.seconds, lag.partitions) == ("batches", 0, 0.0, ())
    await log.publish(batches[0])
    (lag,) = [lag for lag in await stage_lags(log, "demo", None) if lag.group == "trainer"]
    assert lag.messages == 1
    assert lag.seconds is not None and 0 < lag.seconds < 60
    (partition,) = lag.partitions
    assert partition.first == ends[partition.partition]
    elsewhere = [lag for lag in await stage_lags(log, "another", None) if lag.group == "trainer"]
    assert elsewhere[0].messages == sum(ends.values()) + 1


async def test_a_step_far_back_is_found(tmp_path: Path) -> None:
    log = await filled()
    newest = [r for r, _ in small().records if isinstance(r, TrainStep)][-1]
    done = {str(number): end for number, end in (await log.end_offsets("batches")).items()}
    await log.publish(msgspec.structs.replace(newest, positions=done))
    await log.publish(*[msgspec.structs.replace(newest, run="other", step=n) for n in range(120)])
    (lag,) = [lag for lag in await stage_lags(log, "demo", None) if lag.group == "trainer"]
    assert lag.messages == 0


async def test_groups_of_the_run_are_named_by_their_stage(tmp_path: Path) -> None:
    log = await filled()
    for group in ("demo.verifier", "other.verifier"):
        member = await log.join(["trajectories"], group=group, member="v", on_revoked=nothing)
        polled = await member.poll(limit=1, timeout_s=5)
        place = polled[0].position
        await member.commit({TopicPartition(place.topic, place.partition): Committed(place.offset + 1)})
    found = [lag for lag in await stage_lags(log, "demo", None) if lag.topic == "trajectories"]
    total = sum((await log.end_offsets("trajectories")).values())
    assert [(lag.group, lag.messages) for lag in found] == [("verifier", total - 1)]


async def test_the_archiver_is_behind_by_what_is_not_in_its_files(tmp_path: Path) -> None:
    log = await filled()
    assert not [lag for lag in await stage_lags(log, "demo", tmp_path, "here") if lag.group == "archiver"]
    writer = ArchiveWriter(tmp_path / "archive", run="demo", log_id="here")
    async with log.follow(["rewards", "turns"]) as follower:
        async for delivered in follower.catch_up():
            writer.add(delivered)
    writer.flush()
    found = {lag.topic: lag for lag in await stage_lags(log, "demo", tmp_path, "here") if lag.group == "archiver"}
    assert {topic: lag.messages for topic, lag in found.items()} == {"rewards": 0, "turns": 0}
    await log.publish(*[record for record, _ in small().records if type(record).__name__ == "Reward"][:3])
    found = {lag.topic: lag for lag in await stage_lags(log, "demo", tmp_path, "here") if lag.group == "archiver"}
    assert found["rewards"].messages == 3
    assert found["rewards"].seconds is not None and 0 < found["rewards"].seconds < 60
