"""A rollout that fails on our side is tried so often and no more, whichever workers try it; a worker can be stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from consumers.rollout import Rollout, RolloutHandler, work
from kat_stream.config import load
from kat_stream.log import Delivered, Emit, MemoryLog, Position, Retry
from kat_stream.log.message import seal
from kat_stream.log.retries import ATTEMPT, numbered
from kat_stream.runs import choose_ports
from kat_stream.service import Context
from tests.contract.log_records import everything, until_committed
from tests.observe_kit import RUN, request, trajectory
from topics import CATALOGUE, Deferred, LedgerEntry, RolloutRequest, Trajectory

pytestmark = pytest.mark.anyio


class Failing:
    """A runner without sandboxes."""

    async def run_graded(self, asked: RolloutRequest, attempt: int = 1) -> tuple[Trajectory, None]:
        return trajectory(asked, "infra_error", "SandboxUnavailable", attempt), None


async def test_attempts_go_with_the_message_from_worker_to_worker() -> None:
    message = seal(request("g", 0, 1))
    delivered = Delivered(Position(message.topic, 0, 0), message.key, message.value, message.headers, 0)
    runner: Any = Failing()
    for attempt in (1, 2):
        assert isinstance(await RolloutHandler(RUN, runner, attempts=3)(numbered(delivered, attempt)), Retry)
    ended = await RolloutHandler(RUN, runner, attempts=3)(numbered(delivered, 3))
    assert isinstance(ended, Emit) and isinstance(said := ended.records[0], Trajectory) and said.attempt == 3


async def test_more_attempts_than_other_stages_make_are_made_and_end_as_a_trajectory(tmp_path: Path) -> None:
    """Six are allowed: after the fifth the request waits for its last one, and the last one is told."""
    runner: Any = Failing()
    log = MemoryLog()
    await log.apply_topics(CATALOGUE)
    for sample, attempt in enumerate((5, 6)):
        message = seal(request("g", sample, 2))
        await log.append(replace(message, headers={**message.headers, ATTEMPT: str(attempt).encode()}))
    ctx = Context(load(None), RUN, tmp_path, log, "rollout")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(work, ctx, RolloutHandler(RUN, runner, attempts=6))
        await until_committed(log, ctx.group("rollout"), "rollout.requests")
        ctx.stopping.set()
    waiting, ended, word = [d.record() for d in await everything(log, "retries.10s", "trajectories", "ledger")]
    assert isinstance(waiting, Deferred) and waiting.attempt == 6
    assert isinstance(ended, Trajectory) and (ended.outcome, ended.attempt) == ("infra_error", 6)
    assert isinstance(word, LedgerEntry) and (word.rollout_id, word.state) == (ended.rollout_id, "failed")
    assert await everything(log, "dead.letters") == []


async def test_a_worker_stops_while_no_gateway_answers(tmp_path: Path) -> None:
    ctx = Context(config=choose_ports(load(None)), run=RUN, run_dir=tmp_path, log=MemoryLog(), member="rollout")
    with anyio.move_on_after(10) as deadline:
        async with anyio.create_task_group() as group:
            group.start_soon(Rollout().run, ctx)
            await anyio.wait_all_tasks_blocked()
            ctx.stopping.set()
    assert not deadline.cancelled_caught
