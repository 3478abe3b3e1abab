"""Engine: the embedded CPU inference engine as a service, speaking SGLang's HTTP.

In:      policy.versions (once, at start: it takes no traffic before it has the newest weights)
Out:     HTTP on engine.host:engine.port
Key:     -
Commits: nothing
Fails:   no policy version within the deadline, or a port in use, stops the run with the reason
"""

from __future__ import annotations

import logging
from pathlib import Path

import anyio

from kat_stream.engines.embedded import start_engine
from kat_stream.errors import DeadlineExceeded
from kat_stream.service import Context
from topics import PolicyVersion

log = logging.getLogger(__name__)

FIRST_VERSION_S = 180.0


class Engine:
    async def run(self, ctx: Context) -> None:
        config = ctx.config.engine
        if config.urls:
            await ctx.stopping.wait()
            return
        version = await newest_version(ctx, deadline_s=FIRST_VERSION_S)
        server = await start_engine(
            Path(version.path),
            host=config.host,
            port=config.port,
            model_name=ctx.config.policy.name,
            max_total_tokens=config.max_total_tokens,
            max_running=config.max_running,
            weight_version=version.version,
            threads=config.threads,
        )
        log.info("engine at %s runs %s", server.url, version.version)
        try:
            await ctx.stopping.wait()
        finally:
            await server.close()


async def newest_version(ctx: Context, *, deadline_s: float) -> PolicyVersion:
    """The newest policy version of this run on the log, waiting for the first one if there is none yet."""
    newest: PolicyVersion | None = None
    with anyio.move_on_after(deadline_s):
        follower = ctx.log.follow(("policy.versions",), start="earliest")
        end = (await ctx.log.end_offsets("policy.versions")).get(0, 0)
        async for delivered in follower:
            record = delivered.record()
            if isinstance(record, PolicyVersion) and record.run == ctx.run:
                newest = record
            if newest is not None and delivered.position.offset + 1 >= end:
                break
    if newest is None:
        raise DeadlineExceeded("the first policy version from the trainer", deadline_s)
    return newest
