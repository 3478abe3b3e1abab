"""SGLang's HTTP contract as this system relies on it: the same tests run on the embedded engine and on a real SGLang.

By default an embedded engine is started in this process. With KAT_TEST_SGLANG_URL (a running server) and
KAT_TEST_SGLANG_MODEL (its model directory, float32, context >= 256) the tests of the contract, test_engine_http_*.py,
run against that; those of our own limits are left out.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiohttp
import numpy as np
import pytest

from kat_stream.engines.client import EngineClient, Generation, SamplingParams
from kat_stream.engines.embedded import EngineServer, start_engine
from tests.engine_kit import VOCAB, plain_logprobs, plain_model, save_model
from tests.waiting import until

SGLANG = os.environ.get("KAT_TEST_SGLANG_URL")
SGLANG_MODEL = os.environ.get("KAT_TEST_SGLANG_MODEL")
own_limits = pytest.mark.skipif(SGLANG is not None, reason="a limit of the embedded engine; this is a real SGLang")
SECONDS = 60.0


@dataclass
class World:
    """A live engine, and where its weights and another set of them lie."""

    client: EngineClient
    session: aiohttp.ClientSession
    model: Path
    other: Path
    server: EngineServer | None

    async def ask(self, ids: list[int], count: int = 8, rid: str | None = None, **sampling: Any) -> Generation:
        params = SamplingParams(**{"max_new_tokens": count, "temperature": 1.0, "ignore_eos": True, **sampling})
        return await self.client.generate(ids, params, rid=rid or uuid4().hex, deadline_s=SECONDS)

    async def post(self, path: str, body: Any) -> tuple[int, Any]:
        async with self.session.post(self.client.base_url + path, json=body) as response:
            text = await response.text()
            return response.status, (await response.json() if text.startswith(("{", "[")) else text)

    async def running(self) -> int:
        return sum(load.num_running_reqs for load in await self.client.loads())

    async def waiting(self) -> int:
        return sum(load.num_waiting_reqs for load in await self.client.loads())

    async def started(self, count: int = 1) -> None:
        """Until so many requests run."""

        async def run() -> bool:
            return await self.running() >= count

        await until(run, f"{count} running")

    async def held(self, count: int = 1) -> None:
        """Until so many requests wait and none runs."""

        async def wait() -> bool:
            return (await self.running(), await self.waiting()) == (0, count)

        await until(wait, f"{count} waiting")


@pytest.fixture(scope="session")
def directories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("weights")
    if SGLANG_MODEL is not None:
        return Path(SGLANG_MODEL), perturbed(Path(SGLANG_MODEL), base / "other")
    return save_model(base / "one", 0), save_model(base / "two", 1)


def perturbed(model: Path, target: Path) -> Path:
    """The same architecture with other weights, for servers whose model we did not make."""
    import torch

    other = plain_model(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    other.save_pretrained(target)
    return target


@contextlib.asynccontextmanager
async def live(directories: tuple[Path, Path], **sizes: int) -> AsyncIterator[World]:
    model, other = directories
    server = None
    if SGLANG is None:
        server = await start_engine(
            model, model_name="tiny", max_total_tokens=sizes.get("total", 4096), max_running=16, weight_version="v0"
        )
    url = SGLANG if server is None else server.url
    assert url is not None
    try:
        async with aiohttp.ClientSession() as session:
            world = World(EngineClient(url, session), session, model, other, server)
            await world.client.update_weights(model, "v0")
            yield world
            await world.client.resume()
            await world.client.abort(abort_all=True)
            await world.held(0)
    finally:
        if server is not None:
            server.runner.kv.audit(list(server.worker.scheduler.live()))
            await server.close()


def run(directories: tuple[Path, Path], story: Callable[[World], Awaitable[None]], **sizes: int) -> None:
    async def whole() -> None:
        async with live(directories, **sizes) as world, asyncio.timeout(100):
            await story(world)

    asyncio.run(whole())


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCAB, length).tolist()


def check(answer: Generation, ids: list[int], weights: dict[str, Path], temperature: float = 1.0) -> None:
    """Every span's log-probabilities against a plain forward of its weights."""
    assert answer.spans[0].start == 0 and answer.spans[-1].end == len(answer.output_ids) == len(answer.logprobs)
    for span in answer.spans:
        whole = plain_logprobs(plain_model(weights[span.version]), ids + answer.output_ids, temperature)
        expected = whole[len(ids) - 1 :]
        got = answer.logprobs[span.start : span.end]
        np.testing.assert_allclose(got, expected[span.start : span.end], rtol=0, atol=1e-5)
