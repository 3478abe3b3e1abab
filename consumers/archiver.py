"""Archiver: writes every topic to Parquet in the run's folder, so that a run can be read when its log is gone.

In:      every topic
Out:     archive/<topic>/*.parquet
Key:     -
Commits: nothing; the files say what is archived, a restart goes on after it
Fails:   a full disk is waited for; if the last messages cannot be written, the run ends with the reason
"""

from __future__ import annotations

import logging

import anyio

from kat_stream.archive import ArchiveWriter
from kat_stream.errors import StorageError
from kat_stream.log.base import Follower
from kat_stream.service import Context
from topics import CATALOGUE

log = logging.getLogger(__name__)

POLL_S = 0.05
DRAIN_S = 5.0
"""Longest wait at the end for what is already on the log."""


class Archiver:
    async def run(self, ctx: Context) -> None:
        writer = ArchiveWriter(ctx.run_dir / "archive", run=ctx.run, log_id=ctx.log_id)
        names = [topic.name for topic in CATALOGUE]
        follower = ctx.log.follow(names, start=writer.next_offsets())
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(_copy, follower, writer)
                group.start_soon(_flush_regularly, ctx, writer)
                await ctx.stopping.wait()
                with anyio.move_on_after(DRAIN_S):
                    while not await follower.caught_up():
                        await anyio.sleep(POLL_S)
                group.cancel_scope.cancel()
        finally:
            _last_flush(writer)


async def _copy(follower: Follower, writer: ArchiveWriter) -> None:
    async for delivered in follower:
        writer.add(delivered)


async def _flush_regularly(ctx: Context, writer: ArchiveWriter) -> None:
    """A disk that is full for a while costs nothing: what was not written waits for the next time."""
    while not await ctx.stopped_within(ctx.config.archiver.flush_s):
        try:
            await anyio.to_thread.run_sync(writer.flush)
        except OSError as error:
            log.error("the archive cannot be written and waits: %s", error)


def _last_flush(writer: ArchiveWriter) -> None:
    try:
        writer.flush()
    except OSError as error:
        raise StorageError(f"the archive is incomplete, its last messages could not be written: {error}") from error
