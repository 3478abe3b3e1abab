"""Bad input to an engine over HTTP is refused in words, and the engine goes on."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from kat_stream.engines.client import MAX_STOP_BYTES, MAX_STOPS
from kat_stream.errors import EngineRejected
from tests.contract.engine_http_kit import SECONDS, World, directories, own_limits, prompt, run

__all__ = ["directories"]


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
