"""Weight sync: brings every engine to the newest policy version, in the middle of running rollouts.

In:      policy.versions
Out:     nothing on the log; the engines' weights
Key:     run and lineage
Commits: nothing; at start it reads the newest version, asks each engine what it runs, and resumes it
Fails:   an engine that does not answer is tried again until the next version; one that refuses them stops the run,
         and so do weights that after five minutes are still not those that were published
"""

from __future__ import annotations

import logging
import time
from functools import partial
from pathlib import Path

import aiohttp
import anyio

from kat_stream import telemetry
from kat_stream.engines.client import EngineClient, PauseMode
from kat_stream.errors import CheckpointError, DeadlineExceeded, EngineUnavailable
from kat_stream.service import Context, wait_until
from kat_stream.training.publication import verify_weights
from kat_stream.versions import Versions
from topics import PolicyVersion

log = logging.getLogger(__name__)

RETRY_S = 0.5
ENGINE_READY_S = 300.0
RESUME_S = 10.0
"""How long one attempt to wake an engine may take, also that of a service that must stop."""
WEIGHTS_S = 300.0
"""How long weights that are not those that were published are looked at again: they may still be on their way here."""
LOOK_AGAIN_S = 2.0


class WeightSync:
    versions: Versions

    def __init__(self) -> None:
        self._sound: PolicyVersion | None = None
        """The version whose weights were compared last, for all engines."""
        self._checking = anyio.Lock()

    async def run(self, ctx: Context) -> None:
        self.versions = Versions(ctx.run)
        async with aiohttp.ClientSession() as session, anyio.create_task_group() as group:
            for url in ctx.engine_urls:
                group.start_soon(self._keep_current, _Engine(EngineClient(url, session), ctx.config.engine.update_mode))
            group.start_soon(self.versions.follow, ctx.log)
            await ctx.stopping.wait()
            group.cancel_scope.cancel()

    async def _keep_current(self, engine: _Engine) -> None:
        """One engine: whenever it does not run the newest version, give it that version."""
        await wait_until(f"engine {engine.url} to answer", engine.client.health, deadline_s=ENGINE_READY_S)
        while True:
            newest = self.versions.newest
            try:
                await engine.wake()
                if newest is not None and await engine.lacks(newest) and await self._are_sound(newest):
                    await engine.update(newest)
            except (EngineUnavailable, DeadlineExceeded) as error:
                log.warning("engine %s: %s; trying again", engine.url, error)
            await self.versions.newer_than(newest, RETRY_S)

    async def _are_sound(self, version: PolicyVersion) -> bool:
        """Whether the weights are those that were published; False if a newer version came before they were.

        `CheckpointError` if they still are not after WEIGHTS_S.
        """
        give_up = time.monotonic() + WEIGHTS_S
        async with self._checking:
            while self._sound is not version:
                verify = partial(verify_weights, Path(version.path), version.checksum)
                try:
                    await anyio.to_thread.run_sync(verify, abandon_on_cancel=True)
                    self._sound = version
                except CheckpointError as error:
                    if self.versions.newest is not version:
                        return False
                    if time.monotonic() > give_up:
                        raise
                    log.warning("%s: %s; looking again", version.version, error)
                    await self.versions.newer_than(version, LOOK_AGAIN_S)
        return True


class _Engine:
    """One engine. Invariant: a resume is owed from before a pause is sent until a resume was answered."""

    def __init__(self, client: EngineClient, mode: PauseMode) -> None:
        self.client, self.mode, self.url = client, mode, client.base_url
        self.owed = True
        """From the start: an earlier life of this service may have died between pause and resume."""

    async def lacks(self, version: PolicyVersion) -> bool:
        return (await self.client.info()).weight_version != version.version

    async def update(self, version: PolicyVersion) -> None:
        """Pause at a token boundary, swap, go on: calls in flight continue on the new weights."""
        started = time.monotonic()
        self.owed = True
        try:
            await self.client.pause(self.mode)
            await self.client.update_weights(Path(version.path), version.version)
        finally:
            await self.wake()
        telemetry.SYNC_SECONDS.observe(time.monotonic() - started)
        log.info("engine %s runs %s (%.0f ms)", self.url, version.version, 1000 * (time.monotonic() - started))

    async def wake(self) -> None:
        """Resume it if that is owed; a service that must stop does so first. Raises as `EngineClient.resume`."""
        if not self.owed:
            return
        with anyio.move_on_after(RESUME_S, shield=True):
            await self.client.resume()
            self.owed = False
        if self.owed:
            raise DeadlineExceeded(f"{self.url} to resume", RESUME_S)
