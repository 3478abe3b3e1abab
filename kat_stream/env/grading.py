"""Grading: a trajectory in, a Reward out, by default in a second, clean sandbox.

Owns the way from a patch to a verdict. Invariant: `grade` never raises (but for its own cancellation), a Reward with
status "failed" is the grader's failure and carries no score, and hidden tests enter only a sandbox that the agent never
saw, or one in which nothing that it left running can see them or write their result (base.Sandbox.hand_over). What it
left running can disturb the tests (signals, memory, time), which gains it nothing: they then run again without it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from typing import cast

import msgspec

from kat_stream.env.datasets import files_of
from kat_stream.env.sandboxes.base import Sandbox, SandboxBackend
from kat_stream.env.trajectories import TESTS_OWN, apply_patch, sandbox_spec
from kat_stream.env.verifiers import Verdict, Verifier, get_verifier
from kat_stream.errors import ConfigError, SandboxDied, SandboxError, VerifierError
from topics import Reward, Task, Trajectory

_log = logging.getLogger(__name__)

# Create, lay out, apply, read the result: beside the tests' own time.
_OVERHEAD_S = 120.0


def grading_s(task: Task) -> float:
    """The longest that the tests of a task take; in place they may run twice."""
    return task.verifier.timeout_s * (2 if task.verifier.in_place else 1)


class Grader:
    """Grades many trajectories at once in one worker."""

    def __init__(self, sandboxes: SandboxBackend) -> None:
        self._sandboxes = sandboxes

    async def grade(self, trajectory: Trajectory) -> Reward:
        """The Reward of one gradable trajectory whose task is not graded in place."""
        return await _recorded(trajectory, lambda verifier: self._verdict(trajectory, verifier))

    async def grade_in_place(self, trajectory: Trajectory, sandbox: Sandbox) -> Reward:
        """Grade what the agent left in its own sandbox."""
        return await _recorded(trajectory, lambda verifier: _judge(trajectory, verifier, sandbox))

    async def _verdict(self, trajectory: Trajectory, verifier: Verifier) -> Verdict:
        task = trajectory.request.task
        if not trajectory.gradable:
            raise VerifierError(f"{trajectory.rollout_id}: a rollout that ended in {trajectory.outcome} has no grade")
        if task.verifier.in_place:
            raise ConfigError(f"{task.task_id} is graded in place, by the rollout itself")
        if missing := _unsubmitted(trajectory):
            return missing
        spec = sandbox_spec(task, wall_s=task.verifier.timeout_s + _OVERHEAD_S)
        async with await self._sandboxes.create(spec, owner=f"grade-{trajectory.rollout_id}") as sandbox:
            await sandbox.put(await files_of(task, "files"), task.environment.workdir)
            if problem := await apply_patch(sandbox, task, trajectory.patch):
                return Verdict(0.0, {}, problem)
            return await verifier.grade(task, await files_of(task, "tests"), sandbox)


async def _judge(trajectory: Trajectory, verifier: Verifier, sandbox: Sandbox) -> Verdict:
    """In the agent's own sandbox what cannot be graded is the agent's doing, or it would escape its 0 that way."""
    task = trajectory.request.task
    if trajectory.outcome == "sandbox_died":
        return Verdict(0.0, {}, f"nothing is left to be graded: {trajectory.detail}")
    if missing := _unsubmitted(trajectory):
        return missing
    tests = await files_of(task, "tests")

    async def judged() -> Verdict:
        await sandbox.hand_over(TESTS_OWN)
        return await verifier.grade(task, tests, sandbox)

    try:
        return await judged()
    except (SandboxError, VerifierError) as error:
        _log.warning("%s: again, without what the agent left running: %s", trajectory.rollout_id, error)
    try:
        await sandbox.kill_leftovers()
        return await judged()
    except SandboxDied:  # under the tests, which may be too large for it
        raise
    except SandboxError as error:
        return Verdict(0.0, {}, f"the agent left a sandbox in which nothing can be graded: {error}")


def _unsubmitted(trajectory: Trajectory) -> Verdict | None:
    """Score 0 without any test where the task wants the agent to say that it is done and it did not."""
    required = trajectory.request.task.verifier.options.get("require_submit") == "1"
    if not required or trajectory.outcome == "submitted":
        return None
    return Verdict(0.0, {}, f"not submitted: {trajectory.outcome}")


def _checked(verdict: object, name: str) -> Verdict:
    """What a plug-in answered, if that is a verdict; no record could hold another."""
    numbers = (verdict.score, *verdict.components.values()) if isinstance(verdict, Verdict) else ()
    if not numbers or not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
        raise VerifierError(f"the verifier {name!r} answered {verdict!r}, which is no Verdict of finite numbers")
    return cast(Verdict, verdict)


async def _recorded(trajectory: Trajectory, judge: Callable[[Verifier], Awaitable[Verdict]]) -> Reward:
    """The Reward of a verdict, or the one that says why there is none."""
    started = time.monotonic()
    spec = trajectory.request.task.verifier
    blank = Reward(
        run=trajectory.run,
        group_id=trajectory.group_id,
        rollout_id=trajectory.rollout_id,
        task_id=trajectory.request.task.task_id,
        verifier=spec.name,
        purpose=trajectory.request.purpose,
        round=trajectory.request.round,
        life=trajectory.life,
    )
    try:
        verifier = get_verifier(spec.name)
        async with asyncio.timeout(grading_s(trajectory.request.task) + _OVERHEAD_S):
            verdict = _checked(await judge(verifier), spec.name)
    except Exception as error:  # a grading is a record, whatever breaks
        # A grading is a record: whatever breaks, also in a plug-in's code, is this grading's failure and no score.
        _log.warning("grading %s: %s: %s", trajectory.rollout_id, type(error).__name__, error)
        fate = {"status": "failed", "evidence": str(error), "error_class": type(error).__name__}
        return msgspec.structs.replace(blank, **fate, seconds=time.monotonic() - started)
    return msgspec.structs.replace(
        blank,
        verifier_version=verifier.version,
        score=verdict.score,
        components=verdict.components,
        evidence=verdict.evidence,
        seconds=time.monotonic() - started,
    )
