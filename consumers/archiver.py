"""Archiver: writes every topic to Parquet in the run's folder, so that a run can be read when its log is gone.

In:      every topic
Out:     archive/<topic>/run=<run>/day=<day>/*.parquet
Key:     -
Commits: nothing; the archive says what it has, a restart goes on after it
Fails:   a full disk is waited for; if the last messages cannot be written, the run ends with the reason; a second
         archiver of the same folder stops with ArchiveInUse
"""

from __future__ import annotations

import logging
import time

import anyio

from kat_stream.archive import ArchiveWriter, claimed
from kat_stream.errors import StorageError
from kat_stream.log.base import Follower, Log
from kat_stream.service import Context
from topics import CATALOGUE

log = logging.getLogger(__name__)

POLL_S = 0.05
DRAIN_S = 5.0
"""Longest wait at the end for what is already on the log."""
TIDY_S = 1.0
"""How long small files are merged at the end."""
FULL_BYTES = 64 << 20
"""So much waiting is written before its time; twice as much, and nothing more is read until it is."""
TOPICS = tuple(topic.name for topic in CATALOGUE)


class Archiver:
    async def run(self, ctx: Context) -> None:
        directory = ctx.run_dir / "archive"
        with claimed(directory):
            writer = ArchiveWriter(directory, run=ctx.run, log_id=ctx.log_id)
            follower = ctx.log.follow(TOPICS, start=await _starts(ctx.log, writer.next_offsets()))
            try:
                async with follower, anyio.create_task_group() as group:
                    group.start_soon(_copy, follower, writer)
                    group.start_soon(_flush_regularly, ctx, writer)
                    await ctx.stopping.wait()
                    with anyio.move_on_after(DRAIN_S):
                        while not await follower.caught_up():
                            await anyio.sleep(POLL_S)
                    group.cancel_scope.cancel()
            finally:
                with anyio.CancelScope(shield=True):
                    await anyio.to_thread.run_sync(_last_flush, writer)
            await anyio.to_thread.run_sync(_tidy, writer)


async def _starts(the_log: Log, after: dict[tuple[str, int], int]) -> dict[tuple[str, int], int]:
    """Where the archive ends, or where the log begins if what is between was removed; StorageError: another log."""
    starts = {}
    for topic in {topic for topic, _ in after}:
        begins, ends = await the_log.beginning_offsets(topic), await the_log.end_offsets(topic)
        for partition, begin in begins.items():
            archived = after.get((topic, partition), begin)
            if archived > ends[partition]:
                raise StorageError(
                    f"{topic}[{partition}] ends at {ends[partition]}, but {archived} messages of it are archived: "
                    "this is another log; give the run another folder"
                )
            if archived < begin:
                log.error("%s[%d]: %d to %d were removed before they were archived", topic, partition, archived, begin)
            starts[topic, partition] = max(archived, begin)
    return starts


async def _copy(follower: Follower, writer: ArchiveWriter) -> None:
    async for delivered in follower:
        writer.add(delivered)
        while writer.waiting_bytes > 2 * FULL_BYTES:
            await anyio.sleep(POLL_S)


async def _flush_regularly(ctx: Context, writer: ArchiveWriter) -> None:
    """A disk that is full for a while costs nothing: what was not written waits for the next time."""
    while not await _due(ctx, writer):
        try:
            await anyio.to_thread.run_sync(writer.flush)
            await anyio.to_thread.run_sync(writer.merge)
        except OSError as error:
            log.error("the archive cannot be written and waits: %s", error)
            await ctx.stopped_within(ctx.config.archiver.flush_s)


async def _due(ctx: Context, writer: ArchiveWriter) -> bool:
    """Until it is time to write, or there is much to write; True if the service must stop."""
    give_up = time.monotonic() + ctx.config.archiver.flush_s
    while time.monotonic() < give_up and writer.waiting_bytes < FULL_BYTES:
        if await ctx.stopped_within(min(0.2, ctx.config.archiver.flush_s)):
            return True
    return ctx.stopping.is_set()


def _last_flush(writer: ArchiveWriter) -> None:
    try:
        writer.flush()
    except OSError as error:
        raise StorageError(f"the archive is incomplete, its last messages could not be written: {error}") from error


def _tidy(writer: ArchiveWriter) -> None:
    """One file a day where there were many small ones, as far as the time goes; all is archived already."""
    give_up = time.monotonic() + TIDY_S
    try:
        writer.merge(all_small=True, give_up=lambda: time.monotonic() > give_up)
    except OSError as error:
        log.warning("small files of the archive were not merged: %s", error)
