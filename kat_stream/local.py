"""A whole run in one process: every service a task on one loop, over the in-memory log.

Invariant: services stop in the order of the flow, so that what one has written the next has read; a service that
raises stops the run and its error is the run's error.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import anyio

from kat_stream.errors import on_purpose
from kat_stream.service import Context, load_service

log = logging.getLogger(__name__)

SERVICES = (
    "sampler",
    "rollout",
    "verifier",
    "scorer",
    "packer",
    "trainer",
    "weight_sync",
    "gateway",
    "engine",
    "archiver",
)
"""In the order of the flow, which is the order in which they stop."""
HURRY_S, FINISH_S = 3.5, 30.0
"""How long all services together may take to stop: after Ctrl-C (the whole run in less than 5 s), and at the end."""


@dataclass(slots=True)
class _Running:
    name: str
    context: Context
    scope: anyio.CancelScope
    ended: anyio.Event
    finished: bool = False
    """The sampler: its schedule is done."""


async def run_local(ctx: Context, services: Sequence[str] = SERVICES) -> None:
    """Run until the sampler is finished or `ctx.stopping` is set; raises the error of a service that failed: the
    KatError itself where one of its own tasks raised it.

    A scorer takes part only where the configuration asks for one.
    """
    names = [name for name in services if name != "scorer" or ctx.config.scorer.enabled]
    running = [_Running(name, _own_context(ctx, name), anyio.CancelScope(), anyio.Event()) for name in names]
    failures: list[Exception] = []
    async with anyio.create_task_group() as group:
        for service in reversed(running):
            group.start_soon(_supervise, service, ctx.stopping, failures)
        await ctx.stopping.wait()
        with anyio.CancelScope(shield=True):
            await _stop(running, FINISH_S if any(service.finished for service in running) else HURRY_S)
        group.cancel_scope.cancel()
    if failures:
        raise failures[0]


def _own_context(ctx: Context, name: str) -> Context:
    return Context(config=ctx.config, run=ctx.run, run_dir=ctx.run_dir, log=ctx.log, member=name, log_id=ctx.log_id)


async def _supervise(service: _Running, all_stop: anyio.Event, failures: list[Exception]) -> None:
    """One service to its end; the end of the sampler, or of any service by an error, ends the run."""
    try:
        with service.scope:
            await load_service(service.name).run(service.context)
    except Exception as error:  # whatever it is, it ends the run and is raised from run_local
        known = on_purpose(error) or error
        log.error("%s stopped: %s: %s", service.name, type(known).__name__, known)
        failures.append(known)
        all_stop.set()
    finally:
        service.ended.set()
        if service.name == "sampler" and not all_stop.is_set():
            log.info("the schedule is done")
            service.finished = True
            all_stop.set()


async def _stop(running: Sequence[_Running], within_s: float) -> None:
    """One after the other in the order of the flow; none may use up more than half of what is left."""
    give_up = anyio.current_time() + within_s
    for service in running:
        service.context.stopping.set()
        with anyio.move_on_after((give_up - anyio.current_time()) / 2) as late:
            await service.ended.wait()
        if late.cancelled_caught:
            log.warning("%s did not stop in time and is cancelled", service.name)
            service.scope.cancel()
