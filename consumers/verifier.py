"""Verifier: grades each finished trajectory in a second, clean sandbox.

In:      trajectories
Out:     rewards
Key:     group_id
Commits: a trajectory when its reward is acknowledged
Fails:   a grader that breaks is tried again twice, then writes a reward with status "failed": no score, never 0
"""

from __future__ import annotations

from kat_stream import telemetry
from kat_stream.env.grading import Grader
from kat_stream.errors import DeadlineExceeded, SandboxDied, SandboxUnavailable, VerifierError
from kat_stream.log.base import Delivered
from kat_stream.log.outcome import Emit, Outcome, Retry
from kat_stream.log.retries import attempt_of
from kat_stream.log.work import run_work
from kat_stream.sandboxing import open_backend
from kat_stream.service import Context
from topics import Trajectory

DRAIN_S = 3.0
ATTEMPTS = 3
"""Of one grading; below those after which the loop makes a message a dead letter: a failed grading is a reward."""
# Another time may be a better one. A sandbox that died may have been killed with others by a host without memory.
_TRIED_AGAIN = {kind.__name__ for kind in (SandboxUnavailable, SandboxDied, DeadlineExceeded, VerifierError)}


class Verifier:
    async def run(self, ctx: Context) -> None:
        config = ctx.config
        backend = open_backend(config.rollout)
        try:
            await run_work(
                ctx.log,
                ("trajectories",),
                group=ctx.group("verifier"),
                member=ctx.member,
                handler=VerifierHandler(ctx.run, Grader(backend)),
                stopping=ctx.stopping,
                max_in_flight=config.verifier.in_flight,
                drain_s=DRAIN_S,
                dead_letters=ctx.dead_letters,
            )
        finally:
            await backend.close()


class VerifierHandler:
    """One trajectory to one reward; ungradable ones and those graded in place get none here."""

    def __init__(self, run: str, grader: Grader) -> None:
        self.run_name, self.grader = run, grader

    async def __call__(self, delivered: Delivered) -> Outcome:
        trajectory = delivered.record()
        if not isinstance(trajectory, Trajectory) or trajectory.run != self.run_name:
            return Emit()
        if not trajectory.gradable or trajectory.request.task.verifier.in_place:
            return Emit()
        reward = await self.grader.grade(trajectory)
        attempt = attempt_of(delivered)
        if reward.status == "failed" and reward.error_class in _TRIED_AGAIN and attempt < ATTEMPTS:
            return Retry(0.5 * attempt, f"{reward.error_class}: {reward.evidence}")
        telemetry.GRADED.labels(reward.status).inc()
        return Emit(reward)
