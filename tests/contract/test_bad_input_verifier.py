"""Bad input through the verifier as it runs: what cannot be read is a dead letter, what cannot be graded says why, and
neither is ever a score of 0 of somebody's work; the good one behind them is graded.
"""

from __future__ import annotations

from pathlib import Path

import anyio
import msgspec
import pytest

from consumers.verifier import ATTEMPTS, VerifierHandler
from kat_stream.config import Config
from kat_stream.env.grading import Grader
from kat_stream.env.sandboxes import Sandbox, SandboxSpec
from kat_stream.env.sandboxes.bwrap import BwrapBackend
from kat_stream.errors import SandboxUnavailable
from kat_stream.log import Log, MemoryLog, Message, run_work
from kat_stream.log.message import seal
from kat_stream.service import Context, load_service
from tests.contract.env_kit import finished, first_task, harbor_task, needs_bwrap
from tests.contract.log_records import everything, until_written
from tests.contract.test_verifiers import PATCH
from tests.unit.records import request, turn
from topics import CATALOGUE, DeadLetter, Reward, Trajectory

pytestmark = [pytest.mark.anyio, needs_bwrap, pytest.mark.timeout(180)]
RUN = "r1"
WAIT_S = 120.0


def named(good: Trajectory, rollout: str, **fields: object) -> Trajectory:
    return msgspec.structs.replace(good, rollout_id=rollout, **fields)


def other_verifier(good: Trajectory, name: str) -> dict[str, object]:
    task = good.request.task
    task = msgspec.structs.replace(task, verifier=msgspec.structs.replace(task.verifier, name=name))
    return {"request": msgspec.structs.replace(good.request, task=task)}


def no_files(good: Trajectory) -> dict[str, object]:
    task = good.request.task
    environment = msgspec.structs.replace(task.environment, files="harbor:/nowhere#gone")
    return {
        "request": msgspec.structs.replace(good.request, task=msgspec.structs.replace(task, environment=environment))
    }


async def graded(log: Log, tmp_path: Path, count: int) -> list[Reward]:
    """The real service, until it has written so many rewards."""
    ctx = Context(config=Config(), run=RUN, run_dir=tmp_path, log=log, member="verifier-1")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(load_service("verifier").run, ctx)
        rewards = await until_written(log, "rewards", count, WAIT_S)
        ctx.stopping.set()
    return [d.record() for d in rewards]  # type: ignore[misc]


async def test_bad_trajectories_and_a_good_one(tmp_path: Path) -> None:
    harbor_task(tmp_path / "tasks")
    good = finished(first_task(f"harbor:{tmp_path}/tasks"), PATCH)
    torn_turn = msgspec.structs.replace(turn(request(), [1], [2]), sampled_ids=b"\x01\x00\x00", logprobs=b"")
    sealed = seal(good)
    unreadable = [b"\xc1garbage", sealed.value[:-7], b"\xdf\xff\xff\xff\xff"]
    log = MemoryLog()
    await log.apply_topics(CATALOGUE)
    for value in unreadable:
        await log.append(Message("trajectories", sealed.partition, sealed.key, value, sealed.headers))
    from_the_future = {**sealed.headers, "record": b"Trajectory/99"}
    await log.append(Message("trajectories", sealed.partition, sealed.key, sealed.value, from_the_future))
    await log.publish(
        named(good, "of-another-run", run="other"),
        named(good, "broken-by-us", outcome="infra_error"),
        named(good, "torn-arrays", turns=(torn_turn,)),
        named(good, "torn-patch", patch=PATCH[:40] + b"\x00\xff"),
        named(good, "nobodys-verifier", **other_verifier(good, "no-such-verifier")),
        named(good, "no-files", **no_files(good)),
        named(good, "nobody-asked-for-it"),
        named(good, "good"),
    )
    rewards = await graded(log, tmp_path, 6)
    found = {reward.rollout_id: (reward.status, reward.score) for reward in rewards}
    assert found == {
        "torn-arrays": ("graded", 1.0),  # what was done counts here; what was sampled is the packer's to judge
        "torn-patch": ("graded", 0.0),
        "nobodys-verifier": ("failed", 0.0),
        "no-files": ("failed", 0.0),
        "nobody-asked-for-it": ("graded", 1.0),  # no group waits for it
        "good": ("graded", 1.0),
    }
    assert all(reward.error_class and reward.evidence for reward in rewards if reward.status == "failed")
    letters = [d.record() for d in await everything(log, "dead.letters")]
    assert [letter.value for letter in letters if isinstance(letter, DeadLetter)] == [*unreadable, sealed.value]
    assert {letter.error_type for letter in letters if isinstance(letter, DeadLetter)} == {"DecodeError"}


class Crowded(BwrapBackend):
    """A machine that has room for a sandbox only from the `room_at`th time on that it is asked."""

    def __init__(self, room_at: int) -> None:
        super().__init__()
        self.asked, self._room_at = 0, room_at

    async def create(self, spec: SandboxSpec, *, owner: str = "") -> Sandbox:  # type: ignore[override]
        self.asked += 1
        if self.asked < self._room_at:
            raise SandboxUnavailable("no room for a moment")
        return await super().create(spec, owner=owner)


@pytest.mark.parametrize(("room_at", "status", "asked"), [(ATTEMPTS, "graded", 3), (99, "failed", 3)])
async def test_a_grader_that_breaks_is_tried_again_and_ends_as_a_reward(
    tmp_path: Path, room_at: int, status: str, asked: int
) -> None:
    harbor_task(tmp_path / "tasks")
    log = MemoryLog()
    await log.apply_topics(CATALOGUE)
    await log.publish(finished(first_task(f"harbor:{tmp_path}/tasks"), PATCH))
    sandboxes, stopping = Crowded(room_at), anyio.Event()
    handler = VerifierHandler(RUN, Grader(sandboxes))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(
            lambda: run_work(log, ("trajectories",), group="v", member="v-1", handler=handler, stopping=stopping)
        )
        rewards = await until_written(log, "rewards", 1, WAIT_S)
        stopping.set()
    await sandboxes.close()
    assert [(r.status, r.score) for r in (d.record() for d in rewards)] == [(status, float(status == "graded"))]  # type: ignore[attr-defined]
    assert sandboxes.asked == asked
    assert not await everything(log, "dead.letters")
