"""Tokens a second of the embedded engine against `transformers`' own continuous batching, same model, one process.

    python tests/benchmarks/engine.py [--concurrency 1 8 32] [--requests 4] [--threads N] [--json FILE]

The engine is measured over HTTP with log-probabilities, its rival in-process through `ContinuousBatchingManager` and
without (its most favourable terms): random prompts of 40-300 tokens, 32 new tokens each, sampling at temperature 1,
float32. `multi-turn` shows that a turn costs only its new tokens: prefilled tokens against the tokens that were new.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from kat_stream.engines.client import EngineClient, SamplingParams
from kat_stream.engines.embedded import EngineServer, start_engine

NEW_TOKENS = 32
VOCAB = 1024


def build_model() -> Qwen3ForCausalLM:
    """The demo's model with random weights: 0.5 M parameters."""
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCAB, hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, head_dim=32, max_position_embeddings=2048, tie_word_embeddings=True,
            eos_token_id=None, bos_token_id=None, pad_token_id=0,
        )
    ).eval()  # fmt: skip


def prompts(count: int, seed: int) -> list[list[int]]:
    """`count` unrelated prompts of 40 to 300 tokens."""
    random = np.random.default_rng(seed)
    return [random.integers(3, VOCAB, random.integers(40, 301)).tolist() for _ in range(count)]


async def run_engine(server: EngineServer, inputs: list[list[int]], concurrency: int) -> float:
    """Generated tokens a second, `concurrency` requests in flight."""
    sampling = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=1.0, ignore_eos=True)
    queue = list(enumerate(inputs))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        client = EngineClient(server.url, session)

        async def lane() -> int:
            made = 0
            while queue:
                index, ids = queue.pop()
                answer = await client.generate(ids, sampling, rid=f"{id(inputs):016x}{index:08d}", deadline_s=300)
                made += len(answer.output_ids)
            return made

        begin = time.perf_counter()
        made = await asyncio.gather(*(lane() for _ in range(concurrency)))
        return sum(made) / (time.perf_counter() - begin)


class Rival:
    """`transformers`' continuous batching, started once; requests are fed so that `concurrency` are in flight."""

    def __init__(self, model: Qwen3ForCausalLM) -> None:
        config = GenerationConfig(
            max_new_tokens=NEW_TOKENS, do_sample=True, temperature=1.0, eos_token_id=-1, pad_token_id=0
        )
        batching = ContinuousBatchingConfig(page_size=32, num_blocks=1024, max_batch_tokens=1024)
        model.set_attn_implementation("sdpa")
        self.manager = model.init_continuous_batching(generation_config=config, continuous_batching_config=batching)
        self.manager.start()

    def run(self, inputs: list[list[int]], concurrency: int) -> float:
        """Generated tokens a second."""
        queue, made, flying = list(inputs), 0, 0
        begin = time.perf_counter()
        deadline = begin + 300
        while queue or flying:
            while queue and flying < concurrency:
                self.manager.add_request(queue.pop(), max_new_tokens=NEW_TOKENS)
                flying += 1
            result = self.manager.get_result(timeout=1.0)
            if result is not None and result.is_finished():
                made += len(result.generated_tokens)
                flying -= 1
            if time.perf_counter() > deadline:
                raise TimeoutError(f"continuous batching: {flying} requests unfinished after 300 s")
        return made / (time.perf_counter() - begin)

    def close(self) -> None:
        """Stop its thread."""
        self.manager.stop(block=True, timeout=30)


async def multi_turn(server: EngineServer, sessions: int = 8, turns: int = 6) -> dict[str, float]:
    """Prefilled tokens of a multi-turn load against the tokens that were new in each turn."""
    random = np.random.default_rng(5)
    before = server.worker.scheduler.stats.prefilled_tokens
    history = prompts(sessions, 77)
    new = sum(len(ids) for ids in history)
    sampling = SamplingParams(max_new_tokens=10, temperature=1.0, ignore_eos=True)
    async with aiohttp.ClientSession() as session:
        client = EngineClient(server.url, session)
        for turn in range(turns):
            answers = await asyncio.gather(
                *(
                    client.generate(ids, sampling, rid=f"mt{turn}-{i:04d}", deadline_s=60)
                    for i, ids in enumerate(history)
                )
            )
            if turn + 1 < turns:
                for ids, answer in zip(history, answers, strict=True):
                    tool = random.integers(3, VOCAB, 20).tolist()
                    ids.extend(answer.output_ids + tool)
                    new += 1 + len(tool)  # the last sampled token has not run yet
    spent = server.worker.scheduler.stats.prefilled_tokens - before
    return {"prefilled": spent, "new": new, "ratio": spent / new}


async def measure(args: argparse.Namespace, directory: Path) -> list[dict[str, Any]]:
    """One row a concurrency: median of `repeats` runs of each, alternating."""
    model = build_model()
    model.save_pretrained(directory)
    server = await start_engine(
        directory, model_name="bench", max_total_tokens=32768, max_running=64, threads=args.threads
    )
    rival = await asyncio.to_thread(Rival, model)
    rows = []
    try:
        for concurrency in args.concurrency:
            count = max(args.requests * concurrency, 8)
            ours, theirs = [], []
            for repeat in range(args.repeats + 1):
                inputs = prompts(count, 1000 * concurrency + repeat)
                ours.append(await run_engine(server, inputs, concurrency))
                theirs.append(await asyncio.to_thread(rival.run, inputs, concurrency))
            # The first run of each warms up.
            engine, other = statistics.median(ours[1:]), statistics.median(theirs[1:])
            rows.append({"concurrency": concurrency, "engine": engine, "transformers": other, "ratio": engine / other})
        rows.append({"multi_turn": await multi_turn(server)})
    finally:
        await asyncio.to_thread(rival.close)
        await server.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=4, help="requests per concurrent lane")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="torch threads of both")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as directory:
        rows = asyncio.run(measure(args, Path(directory)))
    print(f"{'concurrent':>10} {'engine tok/s':>13} {'transformers tok/s':>19} {'ratio':>6}")
    for row in rows[:-1]:
        print(f"{row['concurrency']:>10} {row['engine']:>13.0f} {row['transformers']:>19.0f} {row['ratio']:>6.2f}")
    turns = rows[-1]["multi_turn"]
    print(f"multi-turn: {turns['prefilled']} tokens prefilled, {turns['new']} new ({turns['ratio']:.3f})")
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
