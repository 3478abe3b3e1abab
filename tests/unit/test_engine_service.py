"""The engine service dies with its model's thread: an engine that answers every call with an error must not stay."""

import gc
from pathlib import Path

import anyio
import pytest

from kat_stream.config import load
from kat_stream.engines.embedded.worker import Worker
from kat_stream.errors import EngineError
from kat_stream.log import open_log
from kat_stream.policy import model_dir
from kat_stream.runs import choose_ports
from kat_stream.service import Context
from producers.engine import Engine
from tests.waiting import until
from topics import CATALOGUE, PolicyVersion


def _break(worker: Worker) -> None:
    """The next step of the model's thread fails, as with broken weights or no memory."""

    def turn() -> None:
        raise MemoryError("no memory")

    worker._turn = turn  # type: ignore[method-assign]


def _workers() -> list[Worker]:
    return [found for found in gc.get_objects() if type(found) is Worker]


def test_a_dead_model_thread_ends_the_service(tmp_path: Path) -> None:
    async def scenario() -> None:
        log = open_log("memory:")
        await log.start()
        await log.apply_topics(CATALOGUE)
        path = str(model_dir("demo"))
        await log.publish(PolicyVersion(run="r", model="policy", lineage="a", number=0, path=path, checksum=""))
        ctx = Context(config=choose_ports(load(None)), run="r", run_dir=tmp_path, log=log, member="engine")
        others = _workers()  # of tests before this one, not collected yet
        async with anyio.create_task_group() as group:

            async def sabotage() -> None:
                (worker,) = await until(lambda: [found for found in _workers() if found not in others], "a worker", 120)
                _break(worker)

            group.start_soon(sabotage)
            with anyio.fail_after(150), pytest.raises(EngineError, match="thread has ended: MemoryError"):
                await Engine().run(ctx)
        await log.close()

    anyio.run(scenario)
