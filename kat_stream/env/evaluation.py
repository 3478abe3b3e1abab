"""Runs one agent over a dataset without the log: `kat-stream eval` and `datasets check`.

Owns the way from a dataset spec to one result a task. Invariant: every task of the dataset appears once in the result,
also a broken one and one whose rollout or grading failed; a failure has no reward (None), never 0.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import msgspec

from kat_stream.env.datasets import open_dataset
from kat_stream.env.grading import Grader
from kat_stream.env.rollout import RolloutRunner, Sessions
from kat_stream.env.sandboxes.base import SandboxBackend
from kat_stream.errors import TaskError
from topics import RolloutRequest, Sampling, Task

# Beside the agent's own time: waiting for a sandbox, laying out, taking the patch.
_DEADLINE_MARGIN_S = 300.0
_FULL = 1.0


@dataclass(frozen=True)
class Result:
    """One task's outcome; `reward` is None where the rollout or the grading failed."""

    task: str
    reward: float | None
    outcome: str
    seconds: float
    detail: str = ""

    def as_row(self) -> dict[str, Any]:
        """The four fields of `eval --json FILE`."""
        return {"task": self.task, "reward": self.reward, "outcome": self.outcome, "seconds": round(self.seconds, 3)}


@dataclass(frozen=True)
class Finding:
    """What the audit of one task found: empty `problems` means that it can be used."""

    task: str
    problems: tuple[str, ...]


async def evaluate(
    spec: str,
    agent: str,
    sandboxes: SandboxBackend,
    *,
    gateway: Sessions | None = None,
    data_url: str = "",
    sampling: Sampling | None = None,
    limit: int | None = None,
    concurrency: int = 2,
    on_result: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Run `agent` once on every task of a dataset and grade it; results in the dataset's order.

    ConfigError for an unknown dataset, option or agent. Agents without a model (oracle, nop) need no gateway.
    """
    runner, grader = RolloutRunner(sandboxes, gateway, data_url), Grader(sandboxes)
    entries = list(islice(open_dataset(spec).scan(), limit))
    slots = asyncio.Semaphore(concurrency)

    async def one(entry: Task | TaskError) -> Result:
        async with slots:
            result = await _one(entry, agent, sampling or Sampling(), runner, grader)
        on_result(result)
        return result

    try:
        async with asyncio.TaskGroup() as group:
            work = [group.create_task(one(entry)) for entry in entries]
    finally:
        await runner.close()
    return [task.result() for task in work]


async def check(
    spec: str, sandboxes: SandboxBackend, *, limit: int | None = None, concurrency: int = 2
) -> list[Finding]:
    """Audit a dataset: the reference solution gets the full reward, doing nothing does not, twice the same."""
    oracle, first, second = [
        await evaluate(spec, agent, sandboxes, limit=limit, concurrency=concurrency)
        for agent in ("oracle", "nop", "nop")
    ]
    return [_finding(*results) for results in zip(oracle, first, second, strict=True)]


async def _one(
    entry: Task | TaskError, agent: str, sampling: Sampling, runner: RolloutRunner, grader: Grader
) -> Result:
    if isinstance(entry, TaskError):
        return Result(str(entry).partition(":")[0], None, "task_error", 0.0, str(entry))
    started = time.monotonic()
    trajectory, reward = await runner.run_graded(_request(entry, agent, sampling))
    if not trajectory.gradable:
        detail = f"{trajectory.error_class}: {trajectory.detail}"
        return Result(entry.task_id, None, trajectory.outcome, time.monotonic() - started, detail)
    reward = reward or await grader.grade(trajectory)
    seconds = time.monotonic() - started
    if reward.status == "failed":
        return Result(entry.task_id, None, "verifier_failed", seconds, f"{reward.error_class}: {reward.evidence}")
    detail = "; ".join(filter(None, (trajectory.detail, reward.evidence)))
    return Result(entry.task_id, reward.score, trajectory.outcome, seconds, detail)


def _request(task: Task, agent: str, sampling: Sampling) -> RolloutRequest:
    name = f"eval-{uuid.uuid4().hex[:12]}"
    return RolloutRequest(
        run="eval",
        group_id=name,
        rollout_id=name,
        sample=0,
        group_size=1,
        purpose="eval",
        task=msgspec.structs.replace(task, run="eval", scaffold=agent),
        sampling=sampling,
        deadline_unix_s=time.time() + task.agent_timeout_s + _DEADLINE_MARGIN_S,
    )


def _finding(oracle: Result, first: Result, second: Result) -> Finding:
    if oracle.outcome == "task_error":
        return Finding(oracle.task, (oracle.detail,))
    problems = []
    if oracle.reward is None or oracle.reward < _FULL:
        problems.append(f"the reference solution gets {oracle.reward} ({oracle.outcome}: {oracle.detail})")
    if first.reward is None or first.reward >= _FULL:
        problems.append(f"doing nothing gets {first.reward} ({first.outcome}: {first.detail})")
    if first.reward != second.reward:
        problems.append(f"doing nothing twice gets {first.reward} and {second.reward}")
    return Finding(oracle.task, tuple(problems))
