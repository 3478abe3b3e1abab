"""An evaluation in the middle of training begins when the engines run the newest version, which may move meanwhile."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest
from aiohttp import web

from kat_stream.config import load
from kat_stream.log.memory import MemoryLog
from kat_stream.service import Context
from producers.sampler import Sampler
from topics import CATALOGUE, PolicyVersion, RolloutRequest

pytestmark = pytest.mark.anyio
SETTINGS = [
    "run.steps=20", "sampler.groups_per_step=1", "sampler.group_size=1",
    "sampler.eval_before=false", "sampler.eval_every=2", "sampler.eval_tasks=2",
    "data.train='mend:train?count=20&seed=0'", "data.held_out='mend:held-out?count=2&seed=0'",
]  # fmt: skip


class Engine:
    """Says what it runs; `asked` is set each time that somebody wants to know."""

    def __init__(self) -> None:
        self.url = ""
        self.runs = "a.1"
        self.asked = anyio.Event()

    async def info(self, _request: web.Request) -> web.Response:
        self.asked.set()
        self.asked = anyio.Event()
        return web.json_response({"model_path": "", "weight_version": self.runs})


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    made = Engine()
    app = web.Application()
    app.router.add_get("/model_info", made.info)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    made.url = site.name
    yield made
    await runner.cleanup()


def version(lineage: str, number: int, **parent: object) -> PolicyVersion:
    return PolicyVersion(run="", model="m", lineage=lineage, number=number, path="", checksum="", **parent)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("meanwhile", "evaluated"),
    [
        ([version("a", 3)], 3),
        ([version("b", 1, parent_lineage="a", parent_number=1), version("b", 2)], 2),
    ],
    ids=["the engine goes past it", "the trainer dies and opens a new lineage"],
)
async def test_an_evaluation_does_not_wait_for_a_version_that_engines_will_never_run(
    tmp_path: Path, engine: Engine, meanwhile: list[PolicyVersion], evaluated: int
) -> None:
    log = MemoryLog()
    await log.apply_topics(CATALOGUE)
    config = load(None, [*SETTINGS, f"engine.urls=['{engine.url}']"])
    ctx = Context(config=config, run="", run_dir=tmp_path, log=log, member="sampler")
    rounds: list[int] = []
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks, log.follow(["rollout.requests"]) as follower:
            tasks.start_soon(Sampler().run, ctx)
            asked = engine.asked
            await log.publish(version("a", 2))
            await asked.wait()  # for a.2, which the engine does not run yet
            for newer in meanwhile:
                await log.publish(newer)
            engine.runs = meanwhile[-1].version
            async for delivered in follower:
                request = delivered.record()
                assert isinstance(request, RolloutRequest)
                if request.purpose == "eval":
                    rounds.append(request.round)
                if len(rounds) == 2:
                    break
            tasks.cancel_scope.cancel()
    assert rounds == [evaluated, evaluated]
