"""Ends over HTTP: aborted requests, clients that go away, a closing engine; and what it says of its load meanwhile."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from uuid import uuid4

import aiohttp
import pytest

from kat_stream.engines.client import EngineClient, SamplingParams
from kat_stream.engines.embedded import start_engine
from kat_stream.errors import EngineUnavailable
from tests.contract.engine_http_kit import SECONDS, World, check, directories, own_limits, prompt, run
from tests.waiting import until

__all__ = ["directories"]


def test_abort_ends_the_requests_of_a_prefix_with_what_they_have(directories: tuple[Path, Path]) -> None:
    async def story(world: World) -> None:
        tasks = {rid: asyncio.create_task(world.ask(prompt(6), 240, rid=rid)) for rid in ("a-1", "a-2", "b-1")}
        await world.started(3)
        await world.client.abort("a-")
        for rid in ("a-1", "a-2"):
            answer = await tasks[rid]
            assert answer.finish_reason == "abort"
            assert len(answer.output_ids) < 240
            check(answer, prompt(6), {"v0": world.model}) if answer.output_ids else None
        assert len((await tasks["b-1"]).output_ids) == 240
        await world.client.abort("nobody")

    run(directories, story)


def test_a_client_that_goes_away_ends_its_request(directories: tuple[Path, Path]) -> None:
    async def story(world: World) -> None:
        for stream in (False, True):

            async def consume(stream: bool = stream) -> None:
                if stream:
                    params = SamplingParams(max_new_tokens=240, ignore_eos=True)
                    async for _ in world.client.generate_stream(prompt(6), params, rid=uuid4().hex, deadline_s=SECONDS):
                        pass
                else:
                    await world.ask(prompt(6), 240)

            await world.client.pause("in_place")
            task = asyncio.create_task(consume())
            if world.server is not None:
                await world.held(1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            if world.server is not None:
                await world.held(0)
            await world.client.resume()
            await world.held(0)

    run(directories, story)


@own_limits
def test_loads_metrics_and_health_tell_the_truth(directories: tuple[Path, Path]) -> None:
    async def story(world: World) -> None:
        await world.ask(prompt(30), 8)
        await world.ask(prompt(30), 8)
        async with world.session.get(world.client.base_url + "/metrics") as response:
            page = dict(line.rsplit(" ", 1) for line in (await response.text()).splitlines() if line[0] != "#")
        label = '{model_name="tiny"}'
        assert float(page["sglang:prompt_tokens_total" + label]) == 60
        assert float(page["sglang:cached_tokens_total" + label]) == 29
        assert float(page["sglang:generation_tokens_total" + label]) == 16
        assert float(page["sglang:forward_execution_seconds_total" + label]) > 0
        assert float(page["sglang:e2e_request_latency_seconds_count" + label]) == 2
        await world.client.pause("in_place")
        task = asyncio.create_task(world.ask([*prompt(30), 5, 5, 5, 5], 4))
        await world.held(1)
        (load,) = await world.client.loads()
        assert load.num_waiting_uncached_tokens == 4
        assert load.max_total_num_tokens == 4096
        await world.client.resume()
        await task
        assert await world.client.health()
        for path in ("/health_generate", "/server_info"):
            async with world.session.get(world.client.base_url + path) as response:
                assert response.status == 200

    run(directories, story)


@own_limits
def test_closing_in_mid_generation_ends_everybody_soon(directories: tuple[Path, Path]) -> None:
    async def story() -> None:
        server = await start_engine(directories[0], model_name="tiny", max_total_tokens=4096, max_running=8)
        async with aiohttp.ClientSession() as session:
            client = EngineClient(server.url, session)
            await client.pause("in_place")
            params = SamplingParams(max_new_tokens=100, ignore_eos=True)
            tasks = [
                asyncio.create_task(client.generate(prompt(9), params, rid=f"r{index}", deadline_s=SECONDS))
                for index in range(5)
            ]

            async def held() -> bool:
                return (await client.loads())[0].num_waiting_reqs == 5

            await until(held, "five requests")
            async with asyncio.timeout(10):
                await server.close()
                results = await asyncio.gather(*tasks, return_exceptions=True)
            assert [type(result) for result in results] == [EngineUnavailable] * 5
            assert not await client.health()

    asyncio.run(story())


@own_limits
def test_the_engine_runs_as_a_process_of_its_own(directories: tuple[Path, Path]) -> None:
    async def story() -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "kat_stream.engines.embedded", "--model-path", str(directories[0]),
            stdout=asyncio.subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )  # fmt: skip
        try:
            assert process.stdout is not None
            line = await asyncio.wait_for(process.stdout.readline(), 100)
            url = line.decode().split()[-1]
            async with aiohttp.ClientSession() as session:
                client = EngineClient(url, session)
                params = SamplingParams(max_new_tokens=3, ignore_eos=True)
                answer = await client.generate([5, 6], params, rid="r", deadline_s=SECONDS)
                assert len(answer.output_ids) == 3
            process.terminate()
            assert await asyncio.wait_for(process.wait(), 20) == 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    asyncio.run(story())
