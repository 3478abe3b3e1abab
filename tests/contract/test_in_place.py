"""Grading in place: in the agent's own sandbox an agent neither forges a reward nor escapes its 0."""

from __future__ import annotations

import shlex
from pathlib import Path

import msgspec
import pytest

from kat_stream.env.sandboxes.base import Sandbox
from kat_stream.env.scaffolds import Limits, ScaffoldResult, SessionEndpoint
from kat_stream.env.trajectories import PATCH_LIMIT
from tests.contract.env_kit import TEST_SH, Doing, done_and_graded, first_task, harbor_task, needs_bwrap, write
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


# Each round of an agent's process ends with the next number in /app/round, by which the tests see that it had its try.
LEFT_RUNNING = {
    "writes the reward": FORGED,
    "writes the tests": "echo 'echo 1 > /logs/verifier/reward.txt' > /tests/test.sh",
    "answers for the command": "for f in /run/kat-stream/*; do echo 'reward.txt\n1' > $f; done",
    "reads the tests": "cp /tests/secret /app/stolen",
    "enters by the tests' processes": (
        "for p in /proc/[0-9]*; do cat $p/root/tests/secret $p/cwd/../tests/secret >> /app/stolen; "
        "echo 1 > $p/root/logs/verifier/reward.txt; for f in $p/fd/*; do echo 'reward.txt\\n1' > $f; done; done"
    ),
}
WAITS = """#!/bin/sh
echo 0 > /logs/verifier/reward.txt
round=$(cat /app/round)
until [ $(cat /app/round) -gt $((round + 2)) ]; do sleep 0.01; done 2>/dev/null
test ! -s /app/stolen || echo 1 > /logs/verifier/reward.txt
"""


@pytest.mark.parametrize("attack", LEFT_RUNNING)
async def test_what_an_agent_left_running_neither_sees_the_tests_nor_writes_their_reward(
    tmp_path: Path, attack: str
) -> None:
    body = f"trap '' TERM HUP; n=0; while :; do ({LEFT_RUNNING[attack]}); n=$((n + 1)); echo $n > /app/round; done"
    left = f"nohup setsid sh -c {shlex.quote(body)} >/dev/null 2>&1 & until [ -s /app/round ]; do sleep 0.01; done"
    task = in_place(tmp_path, WAITS)
    write(tmp_path / "fix-it" / "tests", {"secret": "42"})
    _, reward = await done_and_graded(task, left)
    assert (reward.status, reward.score, reward.evidence) == ("graded", 0.0, ""), reward.evidence


ONCE_THEY_RUN = "until pgrep -f '[/]tests/test.sh'; do sleep 0.01; done"
DISTURBED = {
    "by the end of all": f"{ONCE_THEY_RUN}; kill -9 -1",
    "by the end of their script": f"{ONCE_THEY_RUN}; while :; do pkill -9 -f '[/]tests/test.sh'; sleep 0.01; done",
    "by a want of processes": "for i in $(seq 400); do setsid sleep 1000 & done",
}


@pytest.mark.parametrize("attack", DISTURBED)
async def test_an_agent_that_disturbs_the_tests_neither_gains_nor_loses_by_it(tmp_path: Path, attack: str) -> None:
    task = in_place(tmp_path, "#!/bin/sh\nfor i in $(seq 100); do sleep 0.01; done\n" + TEST_SH)
    left = f"nohup setsid sh -c {shlex.quote(DISTURBED[attack])} >/dev/null 2>&1 &"
    for work, score in (("true", 0.0), (FIX, 1.0)):
        _, reward = await done_and_graded(task, f"{work}; {left}")
        assert (reward.status, reward.score, reward.error_class) == ("graded", score, ""), reward.evidence


async def test_a_server_that_an_agent_left_running_is_there_for_the_tests(tmp_path: Path) -> None:
    ask = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:7000/state.txt').read().decode(), end='')"
    test = f'pgrep -f http.server && test "$(python3 -c "{ask}")" = fixed && echo 1 > /logs/verifier/reward.txt\n'
    serve = f'python3 -m http.server 7000 >/dev/null 2>&1 & until python3 -c "{ask}" 2>/dev/null; do sleep 0.05; done'
    _, reward = await done_and_graded(in_place(tmp_path, f"#!/bin/sh\n{test}"), f"{FIX}; {serve}")
    assert (reward.status, reward.score) == ("graded", 1.0), reward.evidence


async def test_a_sandbox_that_the_agent_left_unfit_for_the_tests_scores_0(tmp_path: Path) -> None:
    """What lies in /tmp is memory: there is none left for the tests' own command server."""
    task = in_place(tmp_path)
    small = msgspec.structs.replace(task.environment, memory_mb=64, disk_mb=64)
    task = msgspec.structs.replace(task, environment=small)
    _, reward = await done_and_graded(task, f"{FIX}; head -c 60M /dev/zero > /tmp/large")
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


async def test_the_final_state_is_graded_as_it_was_left(tmp_path: Path) -> None:
    test = "#!/bin/sh\nstat -c %a:%F f d d/x . | tr '\\n' ' '; echo 1 > /logs/verifier/reward.txt\n"
    left = "mkfifo f; mkdir d; echo x > d/x; chmod 0 d/x; chmod 111 d .; chmod 600 f"
    trajectory, reward = await done_and_graded(in_place(tmp_path, test), left)
    assert reward.evidence == "600:fifo 111:directory 0:regular file 111:directory "
    assert (trajectory.outcome, trajectory.patch) == ("submitted", b"")
    assert "no patch: " in trajectory.detail


class Dying(Doing):
    """Its sandbox is gone when it wants to run its command."""

    async def run(self, task: Task, session: SessionEndpoint, sandbox: Sandbox, limits: Limits) -> ScaffoldResult:
        await sandbox.destroy()
        return await super().run(task, session, sandbox, limits)


async def test_a_sandbox_that_died_scores_0_for_nobody_else_can_grade_it(tmp_path: Path) -> None:
    trajectory, reward = await done_and_graded(in_place(tmp_path), Dying("true"))
    assert (trajectory.outcome, reward.status, reward.score) == ("sandbox_died", "graded", 0.0)
