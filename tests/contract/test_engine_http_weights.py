"""Pauses and new weights of an engine over HTTP: every span is exact for the weights that it names."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import aiohttp
import pytest
from transformers import PreTrainedModel

from kat_stream.engines.client import EngineClient
from kat_stream.engines.embedded import server as engine_server
from kat_stream.engines.embedded import start_engine
from kat_stream.engines.embedded.runner import load_weights
from kat_stream.errors import DeadlineExceeded, EngineRejected, EngineUnavailable
from tests.contract.engine_http_kit import SECONDS, World, check, directories, own_limits, prompt, run
from tests.waiting import until

__all__ = ["directories"]


def test_weights_change_and_the_cache_with_them(directories: tuple[Path, Path]) -> None:
    async def story(world: World) -> None:
        ids = prompt(40)
        await world.ask(ids)
        await world.client.update_weights(world.other, "v1")
        answer = await world.ask(ids)
        assert answer.cached_tokens == 0
        check(answer, ids, {"v1": world.other})
        info = await world.client.info()
        assert info.weight_version == "v1"

    run(directories, story)


def test_retract_makes_each_span_exact_for_its_own_weights(directories: tuple[Path, Path]) -> None:
    async def story(world: World) -> None:
        jobs = [prompt(10 + i, i) for i in range(4)]
        tasks = [asyncio.create_task(world.ask(ids, 240 - 20)) for ids in jobs]
        await world.started(4)
        await world.client.pause("retract")
        await world.client.update_weights(world.other, "v1")
        await world.client.resume()
        spans = []
        for ids, task in zip(jobs, tasks, strict=True):
            answer = await task
            check(answer, ids, {"v0": world.model, "v1": world.other})
            spans += [span.version for span in answer.spans]
        assert "v1" in spans

    run(directories, story)


def test_in_place_freezes_and_goes_on(directories: tuple[Path, Path]) -> None:
    async def story(world: World) -> None:
        ids = prompt(10)
        task = asyncio.create_task(world.ask(ids, 240))
        await world.started()
        await world.client.pause("in_place")
        held = asyncio.create_task(world.ask(ids, 4))
        await world.client.resume()
        answer = await task
        assert len(answer.output_ids) == 240
        check(answer, ids, {"v0": world.model})
        assert len((await held).output_ids) == 4

    run(directories, story)


def test_pause_abort_ends_what_runs_and_holds_what_comes(directories: tuple[Path, Path]) -> None:
    async def story(world: World) -> None:
        task = asyncio.create_task(world.ask(prompt(10), 240))
        await world.started()
        await world.client.pause("abort")
        assert (await task).finish_reason == "abort"
        assert await world.running() == 0
        later = asyncio.create_task(world.ask(prompt(3), 3))
        done, _ = await asyncio.wait({later}, timeout=0.2)
        assert not done
        await world.client.resume()
        assert len((await later).output_ids) == 3

    run(directories, story)


def test_a_checkpoint_that_cannot_be_used_changes_nothing(directories: tuple[Path, Path], tmp_path: Path) -> None:
    async def story(world: World) -> None:
        with pytest.raises(EngineRejected, match="400"):
            await world.client.update_weights(tmp_path / "nowhere", "v9")
        answer = await world.ask(prompt(9))
        assert [span.version for span in answer.spans] == ["v0"]
        check(answer, prompt(9), {"v0": world.model})

    run(directories, story)


def test_flush_needs_an_idle_engine(directories: tuple[Path, Path]) -> None:
    async def story(world: World) -> None:
        ids = prompt(30)
        await world.ask(ids)
        assert (await world.ask(ids)).cached_tokens == 29
        await world.held(0)
        await world.client.flush()
        assert (await world.ask(ids)).cached_tokens == 0
        task = asyncio.create_task(world.ask(ids, 200))
        await world.started()
        await world.client.pause("in_place")
        assert not task.done()
        with pytest.raises(EngineRejected):
            await world.client.flush()
        await world.client.resume()
        assert len((await task).output_ids) == 200

    run(directories, story)


@own_limits
def test_an_update_that_is_given_up_neither_holds_back_nor_comes_true(directories: tuple[Path, Path]) -> None:
    async def story(world: World) -> None:
        server = world.server
        assert server is not None
        # A request that outlives the update's deadline: it drains only when we let it.
        task = asyncio.create_task(world.ask(prompt(10), 200))
        await world.started()
        server.worker.scheduler.max_running = 0
        await world.client.pause("retract")
        await world.client.resume()
        with pytest.raises(DeadlineExceeded):
            await world.client.update_weights(world.other, "v1", deadline_s=1.0)
        server.worker.scheduler.max_running = 16

        async def goes_on() -> bool:
            return (await world.post("/continue_generation", {}))[0] == 200

        await until(goes_on, "the update given up")
        assert [span.version for span in (await task).spans] == ["v0"]
        assert [span.version for span in (await world.ask(prompt(10), 3)).spans] == ["v0"]

    run(directories, story)


@own_limits
def test_an_update_that_the_engine_had_no_time_for_is_no_refusal(
    directories: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_server, "UPDATE_SECONDS", 0.5)

    async def story(world: World) -> None:
        assert world.server is not None
        task = asyncio.create_task(world.ask(prompt(10), 200))
        await world.started()
        world.server.worker.scheduler.max_running = 0
        await world.client.pause("retract")
        await world.client.resume()
        with pytest.raises(EngineUnavailable, match="503: requests in flight to end: nothing within 0.5 s"):
            await world.client.update_weights(world.other, "v1")
        world.server.worker.scheduler.max_running = 16
        await world.client.resume()
        assert len((await task).output_ids) == 200

    run(directories, story)


@own_limits
def test_an_update_of_an_engine_that_closes_meanwhile_is_no_refusal(
    directories: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loading, closed = threading.Event(), threading.Event()

    def load(path: Path) -> PreTrainedModel:
        loading.set()
        assert closed.wait(SECONDS)
        return load_weights(path)

    async def story() -> None:
        server = await start_engine(directories[0], model_name="tiny", max_total_tokens=512, max_running=4)
        async with aiohttp.ClientSession() as session, asyncio.timeout(SECONDS):
            task = asyncio.create_task(EngineClient(server.url, session).update_weights(directories[1], "v1"))
            assert await asyncio.to_thread(loading.wait, SECONDS)
            await server.worker.close()
            closed.set()
            with pytest.raises(EngineUnavailable, match="503: the engine is closed"):
                await task
            await server.close()

    monkeypatch.setattr(engine_server, "load_weights", load)
    asyncio.run(story())
