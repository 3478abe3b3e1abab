"""What the tests of KwaiEnv stand on: bubblewrap sandboxes, small task directories, requests.

The exercise and the tasks here are this project's own, in the layouts that the readers read.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kat_stream.env.datasets import open_dataset
from kat_stream.env.grading import Grader
from kat_stream.env.rollout import RolloutRunner
from kat_stream.env.sandboxes.base import Sandbox, SandboxBackend
from kat_stream.env.sandboxes.bwrap import BwrapBackend
from kat_stream.env.scaffolds import Limits, Needs, ScaffoldResult, SessionEndpoint
from tests.contract.gateway_kit import World
from topics import Reward, RolloutRequest, Sampling, Task, Trajectory

needs_bwrap = pytest.mark.skipif(bool(BwrapBackend.probe()), reason=f"bubblewrap: {BwrapBackend.probe()}")

TASK_TOML = """version = "1.0"
[metadata]
difficulty = "easy"
[verifier]
timeout_sec = 20.0
[agent]
timeout_sec = 20.0
[environment]
memory = "256M"
storage = "16M"
"""
TEST_SH = "#!/bin/sh\nmkdir -p /logs/verifier\ngrep -qx fixed state.txt && echo 1 > /logs/verifier/reward.txt\n"
TEST_SH += "test -e /logs/verifier/reward.txt || echo 0 > /logs/verifier/reward.txt\n"


@asynccontextmanager
async def backend() -> AsyncIterator[SandboxBackend]:
    """A bubblewrap back end, closed at the end."""
    sandboxes = BwrapBackend()
    try:
        yield sandboxes
    finally:
        await sandboxes.close()


def harbor_task(root: Path, name: str = "fix-it", files: Mapping[str, str | None] | None = None) -> Path:
    """A task directory: state.txt must read `fixed`. `files` replaces files or, by None, leaves them out."""
    content: dict[str, str | None] = {
        "task.toml": TASK_TOML,
        "instruction.md": "Make state.txt read: fixed\n",
        "environment/Dockerfile": "FROM debian:bookworm-slim\nWORKDIR /app\nCOPY repo/ /app/\n",
        "environment/repo/state.txt": "broken\n",
        "tests/test.sh": TEST_SH,
        "solution/solve.sh": "#!/bin/sh\necho fixed > state.txt\n",
    }
    return write(root / name, {**content, **(files or {})})


def write(directory: Path, content: Mapping[str, str | None]) -> Path:
    for path, text in content.items():
        if text is not None:
            (directory / path).parent.mkdir(parents=True, exist_ok=True)
            (directory / path).write_text(text)
    return directory


def exercise(root: Path, name: str = "add-two", **changes: Any) -> Path:
    """An exercise in Exercism's layout: add two numbers."""
    module = name.replace("-", "_")
    lists = {"solution": [f"{module}.py"], "test": [f"{module}_test.py"], "example": [".meta/example.py"], **changes}
    test = f"from {module} import add\n\n\ndef test_add():\n    assert add(2, 3) == 5\n"
    content = {
        ".docs/instructions.md": "Add two numbers.\n",
        ".meta/config.json": json.dumps({"files": lists, "blurb": "Add."}),
        ".meta/example.py": "def add(a, b):\n    return a + b\n",
        ".approaches/introduction.md": "return a + b\n",
        f"{module}.py": "def add(a, b):\n    pass\n",
        f"{module}_test.py": test,
    }
    return write(root / "python" / "exercises" / "practice" / name, content)


def first_task(spec: str, **changes: Any) -> Task:
    """The first task of a dataset, with some of its fields changed."""
    return msgspec.structs.replace(open_dataset(spec).tasks(1)[0], **changes)


def request(task: Task, *, seconds: float = 60.0, **sampling: Any) -> RolloutRequest:
    return RolloutRequest(
        run="r1",
        group_id="g1",
        rollout_id="r1g1s0",
        sample=0,
        group_size=1,
        task=task,
        sampling=Sampling(**{"max_turns": 6, "max_new_tokens": 200, **sampling}),
        deadline_unix_s=time.time() + seconds,
    )


async def roll(sandboxes: SandboxBackend, wanted: RolloutRequest, gateway: World | None = None) -> Trajectory:
    """One rollout with a runner of its own."""
    runner = runner_of(sandboxes, gateway)
    try:
        return await runner.run(wanted)
    finally:
        await runner.close()


def runner_of(sandboxes: SandboxBackend, gateway: World | None) -> RolloutRunner:
    return RolloutRunner(sandboxes, gateway and gateway.control, gateway.server.data_url if gateway else "")


class Doing:
    """An agent without a model, which runs one command."""

    name = "doing"

    def __init__(self, command: str) -> None:
        self.command = command

    def needs(self) -> Needs:
        return Needs(session=False)

    async def run(self, task: Task, session: SessionEndpoint, sandbox: Sandbox, limits: Limits) -> ScaffoldResult:
        done = await sandbox.exec(self.command, timeout_s=limits.seconds, merge_stderr=True)
        return ScaffoldResult("submitted" if done.exit_code == 0 else "agent_error", done.stdout.decode())

    async def close(self) -> None:
        pass


async def done_and_graded(task: Task, does: str | Doing) -> tuple[Trajectory, Reward]:
    """What comes of an agent, or of one that runs this command, with its Reward, in place or not as the task says."""
    async with backend() as sandboxes:
        runner = runner_of(sandboxes, None)
        runner._scaffolds["doing"] = does if isinstance(does, Doing) else Doing(does)
        trajectory, reward = await runner.run_graded(request(msgspec.structs.replace(task, scaffold="doing")))
        await runner.close()
        return trajectory, reward or await graded(sandboxes, trajectory)


async def graded(sandboxes: SandboxBackend, trajectory: Trajectory) -> Reward:
    return await Grader(sandboxes).grade(trajectory)


def finished(task: Task, patch: bytes = b"", outcome: str = "submitted") -> Trajectory:
    """A trajectory as a rollout would have made it."""
    wanted = request(task)
    return Trajectory(
        run="r1", group_id="g1", rollout_id="r1g1s0", attempt=1, request=wanted, turns=(), outcome=outcome, patch=patch
    )  # type: ignore[arg-type]
