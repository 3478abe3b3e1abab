"""Runs a whole system from its configuration: in one process on the in-memory log, or as processes on Kafka.

Invariant: whatever ends a run (its schedule, Ctrl-C, an error), its folder is left so that it can be read and resumed.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import anyio

from kat_stream.config import Config
from kat_stream.curriculum import group_of
from kat_stream.errors import KatError, LogUnavailable
from kat_stream.local import run_local
from kat_stream.observe.lag_export import export_lag
from kat_stream.observe.progress import Progress
from kat_stream.observe.sources import archived_ledger
from kat_stream.runs import open_run_log, registered
from kat_stream.service import Context
from kat_stream.signals import stop_on_signal
from kat_stream.supervisor import members_of, supervise
from kat_stream.telemetry import serve_metrics
from topics import LedgerEntry, catalogue

log = logging.getLogger(__name__)

START_S = 60.0
"""How long a run waits at its start for a log that is away or slow."""
RETRY_S = 5.0


@dataclass(slots=True)
class Result:
    """How a run ended."""

    seconds: float
    interrupted: bool
    error: BaseException | None = None


async def execute(config: Config, run_dir: Path, *, resume: bool, progress: Progress) -> Result:
    """Run to the end of the schedule, a signal or an error; the result says which."""
    began = time.monotonic()
    one_process = config.log.url.startswith("memory:")
    the_log = open_run_log(config, run_dir)
    await when_there(the_log.start, run_dir)
    log_id = uuid.uuid4().hex if one_process else "kafka"
    ctx = Context(config=config, run=config.run.name, run_dir=run_dir, log=the_log, member="run", log_id=log_id)
    metrics = serve_metrics(config.metrics.host, config.metrics.port)
    url = f"http://{config.metrics.host}:{metrics.server_port}/metrics"
    signalled = anyio.Event()
    error: BaseException | None = None
    try:
        await when_there(lambda: the_log.apply_topics(catalogue(config.log.partitions)), run_dir)
        if resume and one_process:
            await _settle_interrupted(ctx)
        with registered(run_dir, "run", url):
            async with anyio.create_task_group() as group:
                group.start_soon(stop_on_signal, ctx.stopping, signalled)
                group.start_soon(progress.follow, ctx)
                group.start_soon(export_lag, ctx)
                try:
                    await (run_local(ctx) if one_process else supervise(run_dir, ctx.stopping, members_of(config)))
                except KatError as failure:
                    error = failure
                with anyio.move_on_after(2):
                    await progress.catch_up()
                group.cancel_scope.cancel()
    finally:
        with anyio.CancelScope(shield=True):
            await the_log.close()
        metrics.shutdown()
    return Result(time.monotonic() - began, signalled.is_set(), error)


async def when_there(step: Callable[[], Awaitable[object]], run_dir: Path) -> None:
    """Take a step that needs the log, again and again for START_S; then LogUnavailable says how to go on."""
    give_up = time.monotonic() + START_S
    while True:
        try:
            await step()
            return
        except LogUnavailable as error:
            if time.monotonic() > give_up:
                raise LogUnavailable(
                    f"the log did not answer within {START_S:g} s: {error}; once it does (log.url in"
                    f" {run_dir}/config.toml, `kat-stream broker status`): kat-stream run --resume {run_dir}"
                ) from error
            log.error("waiting for the log, for up to %.0f s more: %s", give_up - time.monotonic(), error)
        await anyio.sleep(RETRY_S)


async def _settle_interrupted(ctx: Context) -> None:
    """The in-memory log died with its process: what was in flight then is cancelled now, so that the ledger closes."""
    lost = archived_ledger(ctx.run_dir).rollouts("in flight")
    entries = [
        LedgerEntry(
            run=ctx.run,
            group_id=group_of(rollout_id),
            rollout_id=rollout_id,
            state="cancelled",
            reason="the run was interrupted",
            stage="run",
        )
        for rollout_id in sorted(lost)
    ]
    if entries:
        log.info("%d rollouts were in flight when the run was interrupted", len(entries))
        await ctx.log.publish(*entries)
