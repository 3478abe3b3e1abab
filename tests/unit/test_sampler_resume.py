"""A run whose log is gone goes on from its checkpoint: what that trained is never asked for again, what was lost is."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from kat_stream.config import load
from kat_stream.curriculum import number_of
from kat_stream.log.memory import MemoryLog
from kat_stream.service import Context
from producers.sampler import Sampler
from topics import CATALOGUE, PolicyVersion, RolloutRequest

pytestmark = pytest.mark.anyio
SETTINGS = [
    "run.steps=4", "sampler.groups_per_step=3", "sampler.group_size=1", "sampler.staleness=1",
    "sampler.eval_before=false", "sampler.eval_after=false", "sampler.eval_every=0",
    "data.train='mend:train?count=20&seed=0'", "data.held_out='mend:held-out?count=2&seed=0'",
]  # fmt: skip


@pytest.mark.parametrize(
    ("below", "beyond", "asked"),
    [
        (1, (3, 4, 6, 7, 8), [1, 2, 5, 9, 10, 11]),  # groups ended in another order than they began
        (6, (), [6, 7, 8, 9, 10, 11]),
    ],
)
async def test_on_a_new_log_only_groups_that_no_step_had_are_asked_for(
    tmp_path: Path, below: int, beyond: tuple[int, ...], asked: list[int]
) -> None:
    log = MemoryLog()
    await log.apply_topics(CATALOGUE)
    config = load(None, SETTINGS)
    ctx = Context(config=config, run=config.run.name, run_dir=tmp_path, log=log, member="sampler")
    version = PolicyVersion(
        run=ctx.run, model="m", lineage="b", number=2, path="", checksum="", parent_lineage="a", parent_number=2,
        groups_below=below, groups_beyond=beyond,
    )  # fmt: skip
    numbers: list[int] = []
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks, log.follow(["rollout.requests"]) as follower:
            tasks.start_soon(Sampler().run, ctx)
            await log.publish(version)
            async for delivered in follower:
                request = delivered.record()
                assert isinstance(request, RolloutRequest)
                numbers.append(number_of(request.group_id))
                if len(numbers) == len(asked):
                    break
            tasks.cancel_scope.cancel()
    assert sorted(numbers) == asked
