"""Engine: the embedded CPU inference engine as a service, speaking SGLang's HTTP.

In:      policy.versions (once, at start: it takes no traffic before it has the newest weights)
Out:     HTTP on engine.host:engine.port
Key:     -
Commits: nothing
Fails:   no policy version within the deadline, a port in use or a model whose thread has ended: it dies with the reason
"""

from __future__ import annotations

import logging
from pathlib import Path

import anyio

from kat_stream.engines.embedded import start_engine
from kat_stream.errors import EngineError
from kat_stream.service import Context
from kat_stream.versions import Versions
from topics import PolicyVersion

log = logging.getLogger(__name__)

FIRST_VERSION_S = 180.0

ALIVE_S = 1.0
"""How often the model's thread is looked after: an engine whose thread has ended answers every call with an error."""


class Engine:
    async def run(self, ctx: Context) -> None:
        config = ctx.config.engine
        if config.urls:
            await ctx.stopping.wait()
            return
        version = await newest_version(ctx)
        server = await start_engine(
            Path(version.path),
            host=config.host,
            port=config.port,
            model_name=ctx.config.policy.name,
            max_total_tokens=config.max_total_tokens,
            max_running=config.max_running,
            weight_version=version.version,
            threads=config.threads,
            dtype=config.dtype,
            record_routing=config.record_routing,
        )
        log.info("engine at %s runs %s", server.url, version.version)
        try:
            while not await ctx.stopped_within(ALIVE_S):
                if server.worker.failure is not None:
                    raise EngineError(f"the model's thread has ended: {server.worker.failure!r}")
        finally:
            await server.close()


async def newest_version(ctx: Context) -> PolicyVersion:
    """The newest policy version of this run on the log, waiting for the first one if there is none yet."""
    versions = Versions(ctx.run)
    await versions.load(ctx.log)
    async with anyio.create_task_group() as group:
        group.start_soon(versions.follow, ctx.log)
        newest = await versions.first(FIRST_VERSION_S)
        group.cancel_scope.cancel()
    return newest
