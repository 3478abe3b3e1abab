"""Rollout: runs agents in sandboxes, many at once, and tells the log how each one ended.

In:      rollout.requests
Out:     trajectories; rewards (where the final state is graded in place); ledger (failed, cancelled)
Key:     group_id
Commits: a request when its trajectory is acknowledged; what is done beyond the low-watermark is remembered
Fails:   trouble on our side is tried again (rollout.attempts), then it is an infra_error trajectory, never a reward
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence

import aiohttp

from kat_stream import telemetry
from kat_stream.env.rollout import RolloutRunner
from kat_stream.env.scaffolds.relay import relay
from kat_stream.gateway.client import GatewayControl
from kat_stream.log.base import Delivered
from kat_stream.log.handling import MAX_ATTEMPTS
from kat_stream.log.outcome import Emit, Outcome, Retry
from kat_stream.log.retries import attempt_of
from kat_stream.log.work import run_work
from kat_stream.sandboxing import open_backend
from kat_stream.service import Context, wait_until
from topics import LedgerEntry, Record, Reward, RolloutRequest, Trajectory

log = logging.getLogger(__name__)

GATEWAY_READY_S = 120.0
GATEWAY_BACK_S = 60.0
"""For a gateway that died to be started again, or another to answer for it."""
MOST_CONNECTIONS = 4096
"""Of all agents of this worker to the gateways."""
DRAIN_S = 3.0
"""How long rollouts of a lost partition may finish before they are cancelled; they run again elsewhere."""


class Rollout:
    async def run(self, ctx: Context) -> None:
        config = ctx.config.rollout
        control_url, *others = _from(ctx.gateway_control_urls, ctx.number)
        door = socket.create_server(("127.0.0.1", 0))
        async with (
            aiohttp.ClientSession() as session,
            relay(door, *_from(ctx.gateway_urls, ctx.number), most=MOST_CONNECTIONS),
        ):
            control = GatewayControl(control_url, session, others, GATEWAY_BACK_S)
            answers = wait_until("the gateway to answer", control.healthy, deadline_s=GATEWAY_READY_S)
            if not await ctx.unless_stopped(answers):
                return
            backend = open_backend(config)
            runner = RolloutRunner(backend, control, f"http://127.0.0.1:{door.getsockname()[1]}")
            handler = RolloutHandler(ctx.run, runner, config.attempts)
            try:
                await backend.reap()
                await work(ctx, handler)
            finally:
                await runner.close()
                await backend.close()


def _from(urls: Sequence[str], number: int) -> list[str]:
    """The gateways in this worker's order: each worker begins with another one, so that they share the load."""
    first = number % len(urls)
    return [*urls[first:], *urls[:first]]


class RolloutHandler:
    """One request to one trajectory."""

    def __init__(self, run: str, runner: RolloutRunner, attempts: int) -> None:
        self.run_name, self.runner, self.attempts = run, runner, attempts

    async def __call__(self, delivered: Delivered) -> Outcome:
        request = delivered.record()
        if not isinstance(request, RolloutRequest) or request.run != self.run_name:
            return Emit()
        attempt = attempt_of(delivered)
        with telemetry.IN_FLIGHT.track_inprogress():
            trajectory, reward = await self.runner.run_graded(request, attempt=attempt)
        if trajectory.outcome == "infra_error" and attempt < self.attempts:
            return Retry(0.5 * attempt, f"{trajectory.error_class}: {trajectory.detail}")
        telemetry.ROLLOUTS.labels(trajectory.outcome).inc()
        telemetry.ROLLOUT_SECONDS.observe(trajectory.seconds)
        return Emit(*_records(trajectory, reward))


async def work(ctx: Context, handler: RolloutHandler) -> None:
    """Requests to rollouts until the service must stop."""
    await run_work(
        ctx.log,
        ("rollout.requests",),
        group=ctx.group("rollout"),
        member=ctx.member,
        handler=handler,
        stopping=ctx.stopping,
        max_in_flight=ctx.config.rollout.in_flight,
        drain_s=DRAIN_S,
        # A rollout that failed for good is no dead letter: its handler ends it, before the loop gives it up.
        max_attempts=max(MAX_ATTEMPTS, handler.attempts),
        dead_letters=ctx.dead_letters,
    )


def _records(trajectory: Trajectory, reward: Reward | None) -> list[Record]:
    """What the log is told; a task that is graded in place has its reward already."""
    if trajectory.gradable:
        return [trajectory, reward] if reward is not None else [trajectory]
    cancelled = trajectory.outcome == "cancelled"
    entry = LedgerEntry(
        run=trajectory.run,
        group_id=trajectory.group_id,
        rollout_id=trajectory.rollout_id,
        state="cancelled" if cancelled else "failed",
        reason=trajectory.detail if cancelled else trajectory.error_class,
        stage="rollout",
    )
    return [trajectory, entry]
