"""SGLang's HTTP contract as this system relies on it: the same file runs on the embedded engine and on a real SGLang.

By default an embedded engine is started in this process. With KAT_TEST_SGLANG_URL (a running server) and
KAT_TEST_SGLANG_MODEL (its model directory, float32, context >= 256) the tests of the contract run against that; those
of our own limits are left out.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiohttp
import numpy as np
import pytest
from transformers import PreTrainedModel

from kat_stream.engines.client import MAX_STOP_BYTES, MAX_STOPS, EngineClient, Generation, SamplingParams
from kat_stream.engines.embedded import EngineServer, start_engine
from kat_stream.engines.embedded import server as engine_server
from kat_stream.engines.embedded.runner import load_weights
from kat_stream.errors import DeadlineExceeded, EngineRejected, EngineUnavailable
from tests.engine_kit import VOCAB, plain_logprobs, plain_model, save_model, save_tokenizer

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

    async def pending(self) -> int:
        return sum(load.num_running_reqs + load.num_waiting_reqs for load in await self.client.loads())

    async def started(self, count: int = 1) -> None:
        """Wait until `count` requests run."""
        await until(lambda: self.running(), lambda now: now >= count)


async def until(read: Callable[[], Awaitable[Any]], good: Callable[[Any], bool], seconds: float = SECONDS) -> Any:
    """Poll until `good`, or fail at the deadline."""
    deadline = time.monotonic() + seconds
    while not good(value := await read()):
        assert time.monotonic() < deadline, f"still {value} after {seconds} s"
        await asyncio.sleep(0.005)
    return value


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
            await until(world.pending, lambda count: count == 0)
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


# -- generation -----------------------------------------------------------------------------------------------------


def test_logprobs_are_those_of_a_plain_forward(directories: tuple[Path, Path]) -> None:
    async def story(world: World) -> None:
        jobs = [(prompt(5 + 7 * i, i), 0.6 + 0.2 * (i % 3)) for i in range(9)]
        answers = await asyncio.gather(*(world.ask(ids, 12, temperature=heat) for ids, heat in jobs))
        for (ids, heat), answer in zip(jobs, answers, strict=True):
            assert (answer.finish_reason, answer.prompt_tokens, len(answer.output_ids)) == ("length", len(ids), 12)
            assert [span.version for span in answer.spans] == ["v0"]
            check(answer, ids, {"v0": world.model}, heat)

    run(directories, story)


def test_greedy_is_the_argmax_and_repeats(directories: tuple[Path, Path]) -> None:
    async def story(world: World) -> None:
        ids = prompt(20)
        first, second = await world.ask(ids, temperature=0.0), await world.ask(ids, temperature=0.0)
        assert first.output_ids == second.output_ids
        assert second.cached_tokens == len(ids) - 1
        check(first, ids, {"v0": world.model})

    run(directories, story)


def test_prompt_logprobs_from_any_position(directories: tuple[Path, Path]) -> None:
    async def story(world: World) -> None:
        ids = prompt(30)
        expected = plain_logprobs(plain_model(world.model), ids)
        for start in (0, 11, 29):
            body = {"input_ids": ids, "return_logprob": True, "logprob_start_len": start,
                    "sampling_params": {"max_new_tokens": 1}}  # fmt: skip
            status, answer = await world.post("/generate", body)
            assert status == 200
            entries = answer["meta_info"]["input_token_logprobs"]
            assert [entry[1] for entry in entries] == ids[start:]
            assert entries[0][0] is None
            got = [entry[0] for entry in entries[1:]]
            np.testing.assert_allclose(got, expected[start:], rtol=0, atol=1e-5)
            assert answer["meta_info"]["cached_tokens"] <= start

    run(directories, story)


def test_stop_token_ends_the_answer_and_stays_in_the_ids(directories: tuple[Path, Path]) -> None:
    async def story(world: World) -> None:
        ids = prompt(12)
        free = await world.ask(ids, 20, temperature=0.0)
        stop = free.output_ids[3]
        answer = await world.ask(ids, 20, temperature=0.0, stop_token_ids=(stop,), ignore_eos=False)
        assert (answer.finish_reason, answer.matched) == ("stop", stop)
        assert answer.output_ids == free.output_ids[: free.output_ids.index(stop) + 1]

    run(directories, story)


def test_a_stream_is_cumulative_and_ends_like_the_whole_answer(directories: tuple[Path, Path]) -> None:
    async def story(world: World) -> None:
        ids = prompt(15)
        params = SamplingParams(max_new_tokens=24, temperature=0.0, ignore_eos=True)
        pieces = [p async for p in world.client.generate_stream(ids, params, rid=uuid4().hex, deadline_s=SECONDS)]
        final = pieces[-1].final
        assert final is not None and len(pieces) > 1
        assert [token for piece in pieces for token in piece.output_ids] == final.output_ids
        assert [value for piece in pieces for value in piece.logprobs] == final.logprobs
        assert final.output_ids == (await world.ask(ids, 24, temperature=0.0)).output_ids

    run(directories, story)


def test_a_stream_comes_in_pieces_of_the_size_that_was_asked_for(directories: tuple[Path, Path]) -> None:
    async def story(world: World) -> None:
        params = SamplingParams(max_new_tokens=24, temperature=0.0, ignore_eos=True, stream_interval=5)
        ids = prompt(15)
        pieces = [p async for p in world.client.generate_stream(ids, params, rid=uuid4().hex, deadline_s=SECONDS)]
        final = pieces[-1].final
        assert final is not None and len(final.output_ids) == 24
        ends = list(accumulate(len(piece.output_ids) for piece in pieces))
        assert 1 < len(ends) <= 6 and ends[-1] == 24
        assert {end % 5 for end in ends[:-1]} == {1}
        assert [token for piece in pieces for token in piece.output_ids] == final.output_ids

    run(directories, story)


def test_sampling_seeds_repeat_in_any_company(directories: tuple[Path, Path]) -> None:
    async def story(world: World) -> None:
        if world.server is None and os.environ.get("KAT_TEST_SGLANG_DETERMINISTIC") is None:
            pytest.skip("a real SGLang honours sampling_seed only with --enable-deterministic-inference")
        ids = prompt(10)
        alone = await world.ask(ids, 16, sampling_seed=5)
        crowd = await asyncio.gather(*(world.ask(ids, 16, sampling_seed=5 + i) for i in range(6)))
        assert crowd[0].output_ids == alone.output_ids
        assert len({tuple(answer.output_ids) for answer in crowd}) > 1

    run(directories, story)


# -- bad input ------------------------------------------------------------------------------------------------------


def test_bad_input_is_a_400_that_says_what(directories: tuple[Path, Path]) -> None:
    async def story(world: World) -> None:
        for body in (
            {"input_ids": []},
            {"input_ids": [3] * 100_000},
            {"input_ids": [3], "sampling_params": {"temperature": -1.0}},
            {"input_ids": [3], "sampling_params": {"top_p": 0.0}},
        ):
            status, answer = await world.post("/generate", body)
            assert status == 400, body
            assert answer["error"]["message"]
        assert (await world.ask([3, 4], 2)).finish_reason == "length"

    run(directories, story)


def _stopping(stops: list[str]) -> bytes:
    return json.dumps({"input_ids": [3], "sampling_params": {"stop": stops}}).encode()


@own_limits
def test_bad_input_names_the_field(directories: tuple[Path, Path]) -> None:
    async def story(world: World) -> None:
        cases = (
            (b'{"input_ids": [3, 96]}', "input_ids: token id 96"),
            (b'{"input_ids": [-1]}', "input_ids: token id -1"),
            (b'{"input_ids": ["a"]}', r"input_ids"),
            (b'{"input_ids": [3], "sampling_params": {"temperature": NaN}}', "temperature"),
            (b'{"input_ids": [3], "sampling_params": {"stop": ["x"]}}', "stop"),
            (_stopping(["a"] * (MAX_STOPS + 1)), "stop: at most"),
            (_stopping(["ok", "\u00df" * (MAX_STOP_BYTES // 2) + "x"]), "stop: a stop string"),
            (_stopping(["\ud800"]), "stop: half a surrogate"),
            (b'{"input_ids": [3], "sampling_params": {"n": 2}}', "n must be 1"),
            (b'{"input_ids": [3], "logprob_start_len": 5, "return_logprob": true}', "logprob_start_len"),
            (b'{"input_ids": [3]', "body"),
        )
        for raw, words in cases:
            async with world.session.post(world.client.base_url + "/generate", data=raw) as response:
                assert response.status == 400
                assert words in (await response.json())["error"]["message"]
        status, _ = await world.post("/pause_generation", {"mode": "sideways"})
        assert status == 400

    run(directories, story)


def test_unknown_fields_are_ignored(directories: tuple[Path, Path]) -> None:
    async def story(world: World) -> None:
        body = {"input_ids": [3, 4], "no_such_field": 1, "sampling_params": {"max_new_tokens": 2, "ignore_eos": True}}
        status, answer = await world.post("/generate", body)
        assert status == 200 and len(answer["output_ids"]) == 2

    run(directories, story)


@own_limits
def test_max_new_tokens_is_clamped_to_the_context(directories: tuple[Path, Path]) -> None:
    async def story(world: World) -> None:
        answer = await world.ask(prompt(200), 10**9)
        assert (answer.finish_reason, len(answer.output_ids)) == ("length", 56)
        with pytest.raises(EngineRejected, match="longer than the model's context length"):
            await world.ask(prompt(256), 1)

    run(directories, story)


def test_a_request_id_is_live_once(directories: tuple[Path, Path]) -> None:
    async def story(world: World) -> None:
        await world.client.pause("in_place")
        twins = {asyncio.create_task(world.ask(prompt(5), 4, rid="twin")) for _ in range(2)}
        done, waiting = await asyncio.wait(twins, timeout=SECONDS, return_when=asyncio.FIRST_COMPLETED)
        assert len(done) == len(waiting) == 1
        with pytest.raises(EngineRejected, match="twin"):
            await done.pop()
        await world.client.resume()
        assert len((await waiting.pop()).output_ids) == 4
        assert len((await world.ask(prompt(5), 4, rid="twin")).output_ids) == 4

    run(directories, story)


# -- aborts ---------------------------------------------------------------------------------------------------------


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
                await until(world.pending, lambda count: count == 1)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            await until(world.pending, lambda count: count == 0) if world.server is not None else None
            await world.client.resume()
            await until(world.pending, lambda count: count == 0)

    run(directories, story)


# -- pauses and weights -----------------------------------------------------------------------------------------------


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
        await until(world.pending, lambda count: count == 0)
        await world.client.flush()
        assert (await world.ask(ids)).cached_tokens == 0
        task = asyncio.create_task(world.ask(ids, 200))
        await world.started()
        await world.client.pause("in_place")
        if not task.done():
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
        await until(lambda: world.post("/continue_generation", {}), lambda reply: reply[0] == 200)
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


# -- load, health, end ------------------------------------------------------------------------------------------------


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
        load = (await until(world.client.loads, lambda loads: loads[0].num_waiting_reqs == 1))[0]
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
            await until(client.loads, lambda loads: loads[0].num_waiting_reqs == 5)
            begin = time.monotonic()
            await server.close()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert time.monotonic() - begin < 10
            assert all(isinstance(result, EngineUnavailable) for result in results)
            assert not await client.health()

    asyncio.run(story())


@own_limits
def test_a_crowd_larger_than_the_memory_is_served(directories: tuple[Path, Path]) -> None:
    async def story(world: World) -> None:
        jobs = [prompt(20 + i, i % 3) for i in range(40)]
        answers = await asyncio.gather(*(world.ask(ids, 30) for ids in jobs))
        for ids, answer in zip(jobs[::9], answers[::9], strict=True):
            check(answer, ids, {"v0": world.model})
        assert all(len(answer.output_ids) == 30 for answer in answers)

    run(directories, story, total=300)


@own_limits
def test_text_and_stop_strings_need_a_tokenizer_beside_the_model(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "speaking", 4)
    save_tokenizer(directory)

    async def story(world: World) -> None:
        base: dict[str, Any] = {"max_new_tokens": 20, "temperature": 0.0, "ignore_eos": True}
        _, free = await world.post("/generate", {"text": "w5 w6 w7", "sampling_params": base})
        assert free["meta_info"]["prompt_tokens"] == 3
        assert free["text"].split() == [f"w{token}" for token in free["output_ids"]]
        word = free["text"].split()[4]
        first = free["text"].split().index(word)
        for trim in (True, False):
            params = {**base, "stop": ["nothing", word], "no_stop_trim": not trim}
            _, answer = await world.post("/generate", {"text": "w5 w6 w7", "sampling_params": params})
            assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": word}
            assert answer["output_ids"] == free["output_ids"][: first + 1]
            assert answer["text"].split() == free["text"].split()[: first + (not trim)]

    run((directory, directory), story)


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
