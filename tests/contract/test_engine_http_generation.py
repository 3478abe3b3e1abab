"""What an engine answers over HTTP is exact: ids, log-probabilities, streams and stops."""

from __future__ import annotations

import asyncio
import os
from itertools import accumulate
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest

from kat_stream.engines.client import SamplingParams
from tests.contract.engine_http_kit import SECONDS, World, check, directories, own_limits, prompt, run
from tests.engine_kit import plain_logprobs, plain_model, save_model, save_tokenizer

__all__ = ["directories"]


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
