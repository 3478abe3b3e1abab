"""How far the stages of one run are behind: consumer groups, and the two that keep their places elsewhere.

The trainer's places are in its TrainSteps, the archiver's in the archive. Invariant: reading lag joins no group and
moves no offset.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import anyio

from kat_stream.errors import DataError
from kat_stream.log.base import Log
from kat_stream.log.lag import Lag, lag_behind, lags
from topics import CATALOGUE, TrainStep

NEWEST = 50
"""Offsets at the end of train.steps in which the run's newest step usually is."""
READ_S = 10.0


async def stage_lags(log: Log, run: str, run_dir: Path | None, log_id: str = "kafka") -> list[Lag]:
    """Lag by stage and topic, with ages; `Lag.group` is the stage's name. DeadlineExceeded.

    `run_dir`: where the archive lies; None, or an archive of another log: the archiver is left out.
    """
    of_groups = [lag for lag in await lags(log, ages=True) if lag.group.startswith(f"{run}.")]
    stages = [replace(lag, group=lag.group.removeprefix(f"{run}.")) for lag in of_groups]
    stages.append(await lag_behind(log, "trainer", "batches", await _trained_up_to(log, run)))
    return stages + (await _archiver(log, run_dir, log_id) if run_dir else [])


async def _trained_up_to(log: Log, run: str) -> dict[int, int]:
    """The positions of the newest step; empty before the first."""
    found = await newest_step(log, run)
    return {int(partition): offset for partition, offset in found.positions.items()} if found is not None else {}


async def newest_step(log: Log, run: str) -> TrainStep | None:
    """The step that a trainer of the run wrote last; DeadlineExceeded."""
    begin = (await log.beginning_offsets("train.steps")).get(0, 0)
    end = (await log.end_offsets("train.steps")).get(0, 0)
    for start in sorted({max(begin, end - NEWEST), begin}, reverse=True):
        found = await _newest_from(log, run, start)
        if found is not None:
            return found
    return None


async def _newest_from(log: Log, run: str, start: int) -> TrainStep | None:
    newest: TrainStep | None = None
    async with log.follow(["train.steps"], start={("train.steps", 0): start}) as follower:
        async for delivered in follower.catch_up(READ_S):
            try:
                record = delivered.record()
            except DataError:  # the archiver and the readers of steps say so; here it is only not the newest
                continue
            if isinstance(record, TrainStep) and record.run == run:
                newest = record
    return newest


async def _archiver(log: Log, run_dir: Path, log_id: str) -> list[Lag]:
    if find_spec("pyarrow") is None:
        return []
    from kat_stream.archive import archived_positions

    names = [topic.name for topic in CATALOGUE]
    # In a thread: where the commit does not say it, the footers of all files are read.
    after = await anyio.to_thread.run_sync(archived_positions, run_dir / "archive", log_id, names)
    seen = {topic for topic, _ in after}
    places = {name: {number: offset for (topic, number), offset in after.items() if topic == name} for name in seen}
    return [await lag_behind(log, "archiver", name, places[name]) for name in names if name in seen]
