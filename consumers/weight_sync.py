"""Weight sync: brings every engine to the newest policy version, in the middle of running rollouts.

In:      policy.versions
Out:     nothing on the log; the engines' weights
Key:     run and lineage
Commits: nothing; at start it reads the newest version and asks each engine what it runs
Fails:   an engine that does not answer is tried again until the next version; one that refuses them stops the run
"""

from __future__ import annotations

import logging
import time
from functools import partial
from pathlib import Path

import aiohttp
import anyio

from kat_stream import telemetry
from kat_stream.engines.client import EngineClient
from kat_stream.errors import DeadlineExceeded, EngineUnavailable
from kat_stream.service import Context, wait_until
from kat_stream.versions import Versions
from topics import PolicyVersion

log = logging.getLogger(__name__)

RETRY_S = 0.5
ENGINE_READY_S = 300.0
RESUME_S = 10.0
"""How long a service that must stop still tries to wake an engine that it paused."""


class WeightSync:
    versions: Versions

    async def run(self, ctx: Context) -> None:
        self.versions = Versions(ctx.run)
        async with aiohttp.ClientSession() as session, anyio.create_task_group() as group:
            for url in ctx.engine_urls:
                group.start_soon(self._keep_current, ctx, EngineClient(url, session), url)
            group.start_soon(self.versions.follow, ctx.log)
            await ctx.stopping.wait()
            group.cancel_scope.cancel()

    async def _keep_current(self, ctx: Context, engine: EngineClient, url: str) -> None:
        """One engine: whenever it does not run the newest version, give it that version."""
        await wait_until(f"engine {url} to answer", partial(_awake, engine), deadline_s=ENGINE_READY_S)
        while True:
            newest = self.versions.newest
            try:
                if newest is not None and (await engine.info()).weight_version != newest.version:
                    await self._update(ctx, engine, url, newest)
            except (EngineUnavailable, DeadlineExceeded) as error:
                log.warning("engine %s: %s; trying again", url, error)
            await self.versions.newer_than(newest, RETRY_S)

    async def _update(self, ctx: Context, engine: EngineClient, url: str, version: PolicyVersion) -> None:
        """Pause at a token boundary, swap, go on: calls in flight continue on the new weights."""
        started = time.monotonic()
        await engine.pause(ctx.config.engine.update_mode)
        try:
            await engine.update_weights(Path(version.path), version.version)
        finally:
            with anyio.move_on_after(RESUME_S, shield=True):
                await engine.resume()
        telemetry.SYNC_SECONDS.observe(time.monotonic() - started)
        log.info("engine %s runs %s (%.0f ms)", url, version.version, 1000 * (time.monotonic() - started))


async def _awake(engine: EngineClient) -> bool:
    """Whether it answers and generates: an earlier life of this service may have died between pause and resume."""
    try:
        ready = await engine.health()
        if ready:
            await engine.resume()
    except (EngineUnavailable, DeadlineExceeded):
        return False
    return ready
