"""Grading in place: in the agent's own sandbox an agent neither forges a reward nor escapes its 0."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from kat_stream.env.sandboxes.base import Sandbox
from kat_stream.env.scaffolds import Limits, ScaffoldResult, SessionEndpoint
from kat_stream.env.trajectories import PATCH_LIMIT
from tests.contract.env_kit import TEST_SH, Doing, done_and_graded, first_task, harbor_task, needs_bwrap
from topics import Task

pytestmark = [pytest.mark.anyio, needs_bwrap]

FIX = "echo fixed > state.txt"
FORGED = "mkdir -p /logs/verifier && echo 1 > /logs/verifier/reward.txt"
LEFT_BEHIND = {
    "a reward file": FORGED,
    "a reward file for ever": f"{FORGED} && chmod 555 /logs/verifier /logs",
    "a hidden reward file": f"{FORGED} && chmod 000 /logs/verifier",
    "a link to a reward file": f"cd /tmp && {FORGED.replace('/logs', 'logs')} && ln -s /tmp/logs/verifier /logs",
    "a file for a directory": "touch /logs/verifier",
    "a directory for the tests": "mkdir -p /tests/test.sh/x && chmod 555 /tests/test.sh",
    "no room for the tests": "chmod 555 /tests",
    "a link for the tests": "ln -s /app/state.txt /tests/test.sh && chmod 000 /tests",
    "a file beside the tests": "echo 'exit 0' > /tests/helper.sh",
}


def in_place(tmp_path: Path, test: str = TEST_SH, agent_s: float = 20.0) -> Task:
    limits = f"[agent]\ntimeout_sec = {agent_s}\n[environment]\nstorage = '16M'\n"
    toml = f"[verifier]\nin_place = true\ntimeout_sec = 20\n{limits}"
    harbor_task(tmp_path, files={"task.toml": toml, "tests/test.sh": test})
    return first_task(f"harbor:{tmp_path}")


@pytest.mark.parametrize("left", LEFT_BEHIND)
async def test_what_an_agent_left_for_the_verifier_counts_for_nothing(tmp_path: Path, left: str) -> None:
    test = TEST_SH.replace("grep -qx fixed state.txt", "test ! -e /tests/helper.sh && grep -qx fixed state.txt")
    task = in_place(tmp_path, test)
    for work, score in (("true", 0.0), (FIX, 1.0)):
        trajectory, reward = await done_and_graded(task, f"{work} && {LEFT_BEHIND[left]}")
        assert trajectory.outcome == "submitted", trajectory.detail
        assert (reward.status, reward.score, reward.error_class) == ("graded", score, ""), reward.evidence


async def test_a_sandbox_that_the_agent_left_unfit_for_the_tests_scores_0(tmp_path: Path) -> None:
    task = in_place(tmp_path)
    verifier = msgspec.structs.replace(task.verifier, name="command", command="true")
    _, reward = await done_and_graded(msgspec.structs.replace(task, verifier=verifier), "chmod 555 /tests")
    assert (reward.status, reward.score) == ("graded", 0.0)
    assert "nothing can be graded" in reward.evidence


async def test_the_tests_have_their_own_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kat_stream.env.rollout._OVERHEAD_S", 3.0)
    task = in_place(tmp_path, f"{TEST_SH}sleep 5\n", agent_s=1.0)
    trajectory, reward = await done_and_graded(task, FIX)
    assert (trajectory.outcome, reward.status, reward.score) == ("submitted", "graded", 1.0), reward.evidence


async def test_a_product_that_no_patch_can_hold_is_graded(tmp_path: Path) -> None:
    build = f"head -c {2 * PATCH_LIMIT} /dev/urandom > product"
    trajectory, reward = await done_and_graded(in_place(tmp_path), f"{FIX}; {build}")
    assert (trajectory.outcome, trajectory.patch, reward.score) == ("submitted", b"", 1.0)


class Dying(Doing):
    """Its sandbox is gone when it wants to run its command."""

    async def run(self, task: Task, session: SessionEndpoint, sandbox: Sandbox, limits: Limits) -> ScaffoldResult:
        await sandbox.destroy()
        return await super().run(task, session, sandbox, limits)


async def test_a_sandbox_that_died_scores_0_for_nobody_else_can_grade_it(tmp_path: Path) -> None:
    trajectory, reward = await done_and_graded(in_place(tmp_path), Dying("true"))
    assert (trajectory.outcome, reward.status, reward.score) == ("sandbox_died", "graded", 0.0)
