"""A rollout through the real gateway in real sandboxes: whatever a policy does, one trajectory with a typed outcome."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

import anyio
import msgspec
import pytest

from kat_stream.env.datasets import dataset_of
from kat_stream.env.rollout import RolloutRunner
from kat_stream.env.sandboxes.bwrap_sandbox import BwrapSandbox
from kat_stream.env.trajectories import PATCH_LIMIT
from kat_stream.errors import DeadlineExceeded, GatewayError
from kat_stream.gateway.client import GatewayControl
from tests.contract.env_kit import (
    backend,
    finished,
    first_task,
    graded,
    harbor_task,
    needs_bwrap,
    request,
    roll,
    runner_of,
    write,
)
from tests.contract.gateway_kit import by_bytes, saying, tokenizer, world
from tests.waiting import until
from topics import Task, Trajectory, Turn

pytestmark = [pytest.mark.anyio, needs_bwrap]

MEND = "mend:train?count=30&seed=0"
FIX = "echo fixed > state.txt"


async def act(tmp_path: Path, *replies: str, **sampling: int) -> Trajectory:
    """What comes of a policy that says these replies in turn, the last one for ever."""
    harbor_task(tmp_path)
    task = msgspec.structs.replace(first_task(f"harbor:{tmp_path}"), scaffold="shell")
    async with backend() as sandboxes, world(saying(*replies)) as gateway:
        return await roll(sandboxes, request(task, **sampling), gateway)


async def test_a_good_rollout_of_mend_is_rewarded_and_its_turns_are_its_own() -> None:
    task = first_task(MEND)
    solution = _solution(task)
    async with backend() as sandboxes, world(saying(*solution, "submit")) as gateway:
        trajectory = await roll(sandboxes, request(task), gateway)
        assert (trajectory.outcome, trajectory.error_class) == ("submitted", "")
        assert [turn.content for turn in trajectory.turns] == [*solution, "submit"]
        assert list(trajectory.turns) == await gateway.published()
        assert trajectory.patch.startswith(b"diff --git ")
        reward = await graded(sandboxes, trajectory)
        assert (reward.status, reward.score, reward.life) == ("graded", 1.0, trajectory.life)
        assert await gateway.control.sessions() == []


def _solution(task: Task) -> list[str]:
    return dataset_of(task).solution(task)["solve.sh"][0].decode().splitlines()


async def test_work_that_was_not_submitted_scores_0_where_the_task_wants_that() -> None:
    task = first_task(MEND)
    solution = _solution(task)
    async with backend() as sandboxes, world(saying(*solution, "true")) as gateway:
        trajectory = await roll(sandboxes, request(task, max_turns=3), gateway)
        reward = await graded(sandboxes, trajectory)
    assert trajectory.outcome == "turn_limit"
    assert trajectory.patch != b""
    assert (reward.status, reward.score, reward.evidence) == ("graded", 0.0, "not submitted: turn_limit")


async def test_output_and_exit_code_come_back_to_the_policy(tmp_path: Path) -> None:
    harbor_task(tmp_path)
    task = first_task(f"harbor:{tmp_path}")
    async with backend() as sandboxes, world(saying("cat state.txt; false", "submit")) as gateway:
        await roll(sandboxes, request(task), gateway)
        assert "broken\n[exit 1]" in tokenizer().decode(gateway.engines[0].requests[-1].input_ids)


async def test_a_reply_without_a_command_costs_a_turn(tmp_path: Path) -> None:
    trajectory = await act(tmp_path, " ", max_turns=3)
    assert (trajectory.outcome, len(trajectory.turns)) == ("turn_limit", 3)


async def test_a_reply_that_is_cut_ends_the_rollout(tmp_path: Path) -> None:
    trajectory = await act(tmp_path, "echo " + "x" * 50, max_new_tokens=20)
    assert trajectory.outcome == "token_limit"
    assert trajectory.turns[-1].finish_reason == "length"


async def test_a_full_context_ends_the_rollout(tmp_path: Path) -> None:
    trajectory = await act(tmp_path, "head -c 300 /dev/zero | tr '\\0' x", max_context=1000, max_turns=50)
    assert (trajectory.outcome, trajectory.error_class) == ("token_limit", "")
    assert 1 <= len(trajectory.turns) < 10


HOSTILE = {
    "endless output": "yes",
    "binary output": "head -c 100000 /dev/urandom",
    "kill all": "pkill -9 -1; kill -9 -1",
    "fork bomb": "f() { f | f & }; f; wait",
    "memory": "head -c 2G /dev/zero | tail",
}


@pytest.mark.parametrize("case", HOSTILE)
async def test_a_hostile_command_never_becomes_our_failure(tmp_path: Path, case: str) -> None:
    harbor_task(tmp_path)
    task = msgspec.structs.replace(first_task(f"harbor:{tmp_path}"), agent_timeout_s=12.0)
    async with backend() as sandboxes, world(saying(HOSTILE[case], FIX, "submit")) as gateway:
        with anyio.fail_after(60.0):
            trajectory = await roll(sandboxes, request(task), gateway)
            reward = await graded(sandboxes, trajectory)
    # agent_error: its processes are still there and leave none for git, so that there is no patch to read.
    assert trajectory.outcome in ("submitted", "sandbox_died", "time_limit", "agent_error"), trajectory.detail
    assert reward.status == "graded"
    assert reward.score == float(trajectory.outcome == "submitted")


async def test_a_full_disk_leaves_a_patch_or_a_typed_error(tmp_path: Path) -> None:
    harbor_task(tmp_path)
    task = first_task(f"harbor:{tmp_path}")
    fill = f"{FIX}; echo big >> .git/info/exclude; cat /dev/zero > big; head -c 9 big | wc -c"
    async with backend() as sandboxes, world(saying(fill, "submit")) as gateway:
        trajectory = await roll(sandboxes, request(task), gateway)
    assert trajectory.outcome in ("submitted", "agent_error"), trajectory.detail
    assert (b"+fixed" in trajectory.patch) == (trajectory.outcome == "submitted")


async def test_a_patch_that_is_too_large_is_the_agents_error(tmp_path: Path) -> None:
    trajectory = await act(tmp_path, f"head -c {2 * PATCH_LIMIT} /dev/urandom > big", "submit")
    assert trajectory.outcome == "agent_error"
    assert "larger than" in trajectory.detail
    assert trajectory.patch == b""


@pytest.mark.parametrize(
    "tampering",
    [
        "rm -rf .git",
        "git add -A && git commit -q -m mine",
        "echo garbage > .git/config",
        "git checkout -q --orphan other && git add -A && git commit -q -m other",
    ],
)
async def test_the_patch_survives_what_an_agent_does_to_the_repository(tmp_path: Path, tampering: str) -> None:
    identity = "export GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@b GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a@b"
    harbor_task(tmp_path)
    task = first_task(f"harbor:{tmp_path}")
    async with backend() as sandboxes, world(saying(f"{identity}; {FIX}; {tampering}", "submit")) as gateway:
        trajectory = await roll(sandboxes, request(task), gateway)
        reward = await graded(sandboxes, trajectory)
    assert (trajectory.outcome, trajectory.detail) == ("submitted", "")
    assert (reward.score, reward.evidence) == (1.0, "")


async def test_an_agent_that_never_ends_runs_into_its_time(tmp_path: Path) -> None:
    harbor_task(tmp_path)
    task = msgspec.structs.replace(first_task(f"harbor:{tmp_path}"), agent_timeout_s=2.0)
    async with backend() as sandboxes, world(saying(f"{FIX}; sleep 100")) as gateway:
        trajectory = await roll(sandboxes, request(task), gateway)
        assert trajectory.outcome == "time_limit"
        assert trajectory.patch != b""
        late = await roll(sandboxes, request(task, seconds=1.5), gateway)
        assert (late.outcome, late.error_class) == ("infra_error", "DeadlineExceeded")
        never = await roll(sandboxes, request(task, seconds=0.0), gateway)
        assert (never.outcome, never.error_class) == ("infra_error", "DeadlineExceeded")


async def test_a_sandbox_that_does_not_end_in_time_costs_no_rollout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = BwrapSandbox._end

    async def late(self: BwrapSandbox) -> None:
        await end(self)
        raise DeadlineExceeded(f"end of sandbox {self.id}", 30.0)

    monkeypatch.setattr(BwrapSandbox, "_end", late)
    harbor_task(tmp_path)
    task = first_task(f"harbor:{tmp_path}")
    async with backend() as sandboxes, world(saying(FIX, "submit")) as gateway:
        trajectory = await roll(sandboxes, request(task), gateway)
        assert (trajectory.outcome, len(trajectory.turns)) == ("submitted", 2)
        assert await gateway.control.sessions() == []


async def test_a_cancelled_rollout_ends_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    harbor_task(tmp_path)
    task = first_task(f"harbor:{tmp_path}")
    cancelled = asyncio.Event()
    async with backend() as sandboxes, world(saying("sleep 100")) as gateway:
        runner = runner_of(sandboxes, gateway)
        rollout = asyncio.create_task(runner.run(request(task), 2, cancelled))
        await until(lambda: bool(gateway.engines[0].requests))
        cancelled.set()
        trajectory = await asyncio.wait_for(rollout, 10.0)
        await runner.close()
        assert (trajectory.outcome, trajectory.attempt) == ("cancelled", 2)
        assert len(trajectory.turns) == 1
        assert await gateway.control.sessions() == []


async def test_a_rollout_that_its_worker_cuts_off_leaves_nothing(tmp_path: Path) -> None:
    """As a worker does whose time to drain is over: by a scope of anyio, which cancels all that is awaited."""
    harbor_task(tmp_path)
    task = first_task(f"harbor:{tmp_path}")
    async with backend() as sandboxes, world(saying("touch begun; sleep 100")) as gateway:
        runner = runner_of(sandboxes, gateway)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(runner.run, request(task))
            await until(lambda: bool(gateway.engines[0].requests))
            sandbox = next(iter(sandboxes._alive))
            await until(lambda: "sleep" in _commands(sandbox))
            tasks.cancel_scope.cancel()
        assert not sandboxes._alive and not sandbox._parts.group.directories[0].exists()
        assert await gateway.control.sessions() == []
        await runner.close()


class Silent:
    """A gateway that answers no more once a session is open."""

    def __init__(self, control: GatewayControl) -> None:
        self.open = control.open

    async def close(self, session_id: str) -> list[Turn]:
        await anyio.sleep_forever()
        raise AssertionError


async def test_a_worker_that_stops_does_not_wait_for_a_gateway_that_is_gone(tmp_path: Path) -> None:
    harbor_task(tmp_path)
    task = first_task(f"harbor:{tmp_path}")
    async with backend() as sandboxes, world(saying("sleep 100")) as gateway:
        runner = RolloutRunner(sandboxes, Silent(gateway.control), gateway.server.data_url)
        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(runner.run, request(task))
                await until(lambda: bool(gateway.engines[0].requests))
                tasks.cancel_scope.cancel()
        assert not sandboxes._alive
        await runner.close()


def _commands(sandbox: BwrapSandbox) -> set[str]:
    """Names of what runs inside now."""
    names = set()
    for pid in sandbox._members():
        with suppress(FileNotFoundError, ProcessLookupError):
            names.add(Path(f"/proc/{pid}/comm").read_text().strip())
    return names


async def test_our_failures_are_typed(tmp_path: Path) -> None:
    harbor_task(tmp_path)
    task = first_task(f"harbor:{tmp_path}")
    gone = msgspec.structs.replace(
        task, environment=msgspec.structs.replace(task.environment, files="harbor:/gone#fix-it")
    )
    unknown = msgspec.structs.replace(task, scaffold="shel")
    async with backend() as sandboxes:
        assert (await roll(sandboxes, request(gone))).error_class == "ConfigError"
        assert "did you mean 'shell'" in (await roll(sandboxes, request(unknown))).detail
        no_gateway = await roll(sandboxes, request(task))
        assert (no_gateway.outcome, no_gateway.error_class) == ("infra_error", "ConfigError")
        async with world(saying("true")) as gateway:
            await gateway.server.close()
            trajectory = await roll(sandboxes, request(task), gateway)
        assert (trajectory.outcome, trajectory.error_class) == ("infra_error", GatewayError.__name__)


PLUGIN = """
from kat_stream.env.scaffolds import Needs
class Broken:
    name = "broken"
    def needs(self):
        return Needs(session=False)
    async def run(self, task, session, sandbox, limits):
        raise ZeroDivisionError("a bug in somebody's plug-in" * 1_000_000)
    async def close(self):
        pass
"""


async def test_a_plug_in_that_raises_ends_its_own_rollout_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = "[kat_stream.scaffolds]\nbroken = somebodys_plugin:Broken\nabsent = somebodys_plugin:Absent\n"
    metadata = "Metadata-Version: 2.1\nName: somebodys-plugin\nVersion: 1\n"
    info = {"METADATA": metadata, "entry_points.txt": points}
    write(tmp_path / "somebodys_plugin-1.dist-info", info)
    write(tmp_path, {"somebodys_plugin.py": PLUGIN})
    monkeypatch.syspath_prepend(tmp_path)
    task = first_task(MEND)
    async with backend() as sandboxes:
        broken = await roll(sandboxes, request(msgspec.structs.replace(task, scaffold="broken")))
        absent = await roll(sandboxes, request(msgspec.structs.replace(task, scaffold="absent")))
        oracle = await roll(sandboxes, request(msgspec.structs.replace(task, scaffold="oracle")))
    assert (broken.outcome, broken.error_class) == ("infra_error", "ZeroDivisionError")
    assert len(broken.detail) == 2000, "a record has room for so much"
    assert (absent.outcome, absent.error_class) == ("infra_error", "ConfigError")
    assert oracle.outcome == "submitted"


async def test_a_task_that_is_graded_in_place_is_graded_by_the_rollout(tmp_path: Path) -> None:
    toml = "[verifier]\nin_place = true\n"
    test = "#!/bin/sh\nmkdir -p /logs/verifier; test -e /tmp/outside && echo 0.5 > /logs/verifier/reward.txt\n"
    harbor_task(tmp_path, files={"task.toml": toml, "tests/test.sh": test})
    task = first_task(f"harbor:{tmp_path}")
    async with backend() as sandboxes, world(saying("touch /tmp/outside", "submit")) as gateway:
        runner = runner_of(sandboxes, gateway)
        trajectory, reward = await runner.run_graded(request(task))
        again, _ = await runner.run_graded(request(task))
        await runner.close()
        assert reward is not None
        assert (reward.score, reward.rollout_id) == (0.5, trajectory.rollout_id)
        assert trajectory.life == reward.life != again.life
        elsewhere = await graded(sandboxes, finished(task))
    assert (elsewhere.status, elsewhere.error_class) == ("failed", "ConfigError")


async def test_a_groups_rollouts_run_side_by_side() -> None:
    task = first_task(MEND)
    async with backend() as sandboxes, world(lambda prompt: by_bytes("submit")) as gateway:
        runner = runner_of(sandboxes, gateway)
        trajectories = await asyncio.gather(*(runner.run(request(task)) for _ in range(12)))
        await runner.close()
    assert {trajectory.outcome for trajectory in trajectories} == {"submitted"}
    assert len({trajectory.turns[0].session_id for trajectory in trajectories}) == 12
