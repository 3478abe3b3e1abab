"""How much averaging K repeated prefills helps, on engines with real noise: `python -m tests.benchmarks.mcla`.

Fixed weights, fixed texts, R repeats of each; every repeat sends all texts in another random order among strangers, so
that co-batches, chunk boundaries and matrix shapes change as they do in a run. One table: a mixture of experts and a
dense model in bfloat16, float16 (the cheap rival) and float32 (the control), and copies of one prefill, for which no
benefit may be claimed. `error` is the mean |log-prob - its float32 value| a token: what is systematic stays there.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from kat_stream.engines.client import EngineClient
from kat_stream.engines.embedded import start_engine
from kat_stream.engines.embedded.runner import Dtype
from kat_stream.rl.mcla import average, identical, scaling, variances

VOCAB, CONTEXT, PROMPT, SAMPLED = 512, 256, 32, 48
CALL_S = 300.0
KS = (2, 4, 8, 16, 32)
BAND = 0.2
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Row:
    name: str
    repeats: Floats
    """float32[R, texts * SAMPLED]."""


def save_model(directory: Path, family: str) -> Path:
    """A small model with random weights that are large enough for its distributions to be far from uniform."""
    size: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": CONTEXT,
        "initializer_range": 0.15,
    }  # fmt: skip
    torch.manual_seed(0)
    model: PreTrainedModel
    if family == "moe":
        experts: dict[str, Any] = {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "decoder_sparse_step": 1,
        }
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**size, **experts))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**size))
    model.save_pretrained(directory)
    return directory


async def measure(model: Path, dtype: Dtype, texts: Sequence[list[int]], repeats: int) -> Floats:
    """float32[R, S] log-probs of the last SAMPLED ids of each text."""
    server = await start_engine(model, model_name="m", max_total_tokens=32768, max_running=32, dtype=dtype)
    chance = random.Random(7)
    try:
        async with aiohttp.ClientSession() as session:
            engine = EngineClient(server.url, session)
            return np.stack([await _repeat(engine, texts, chance) for _ in range(repeats)])
    finally:
        await server.close()


async def _repeat(engine: EngineClient, texts: Sequence[list[int]], chance: random.Random) -> Floats:
    strangers = [[chance.randrange(VOCAB) for _ in range(chance.randrange(20, 200))] for _ in range(len(texts) // 4)]
    sent = [*texts, *strangers]
    order = chance.sample(range(len(sent)), len(sent))

    async def score(number: int) -> tuple[int, list[float]]:
        start = PROMPT if number < len(texts) else len(sent[number]) - 1
        made = await engine.prefill(sent[number], start, rid=uuid.uuid4().hex, bypass_cache=True, deadline_s=CALL_S)
        return number, made.logprobs

    found = dict(await asyncio.gather(*(score(number) for number in order)))
    return np.concatenate([np.array(found[number], np.float32) for number in range(len(texts))])


def clip_share(repeats: Floats, k: int) -> float:
    """Share of turns whose product ratio between two independent averages of k repeats lies outside 1 +- BAND."""
    if len(repeats) < 2 * k:
        return float("nan")
    gap = average(repeats[:k], "logprob_mean") - average(repeats[k : 2 * k], "logprob_mean")
    ratio = np.exp(gap.reshape(-1, SAMPLED).sum(1))
    return float(np.mean(np.abs(ratio - 1) > BAND))


def bootstrap(repeats: Floats, k: int, rounds: int = 200) -> tuple[float, float]:
    """5 % and 95 % quantile of K var_K / var_1 over resampled texts."""
    chance = np.random.default_rng(0)
    turns = repeats.reshape(len(repeats), -1, SAMPLED)
    picked = (chance.integers(0, turns.shape[1], turns.shape[1]) for _ in range(rounds))
    found = [scaling(turns[:, pick].reshape(len(repeats), -1), k) for pick in picked]
    low, high = np.quantile([value for value in found if value is not None], [0.05, 0.95])
    return float(low), float(high)


def line(row: Row, exact: Floats) -> str:
    if identical(row.repeats):
        return f"| {row.name} | 0 | 0 | 0 | no benefit: all repeats are identical | | | |"
    spread = variances(row.repeats)
    quantiles = " / ".join(f"{np.quantile(spread, q):.1e}" for q in (0.5, 0.99, 1.0))
    ks = [k for k in KS if len(row.repeats) >= 2 * k]
    ratios = " ".join(f"{scaling(row.repeats, k):.2f}" for k in ks)
    low, high = bootstrap(row.repeats, 8) if 8 in ks else (float("nan"), float("nan"))
    errors = [float(np.abs(values - exact).mean()) for values in (row.repeats[0], average(row.repeats, "logprob_mean"))]
    clips = " / ".join(f"{clip_share(row.repeats, k):.1%}" for k in (1, 8, 32))
    head = f"| {row.name} | {spread.mean():.1e} | {quantiles} | {ratios} | {low:.2f}..{high:.2f} "
    return head + f"| {errors[0]:.1e} | {errors[1]:.1e} | {clips} |"


async def run(args: argparse.Namespace) -> None:
    chance = random.Random(1)
    texts = [[chance.randrange(VOCAB) for _ in range(PROMPT + SAMPLED)] for _ in range(args.turns)]
    print(f"{args.turns} turns of {SAMPLED} tokens, {args.repeats} repeats, co-batches changing; K = {KS}")
    print(
        "| engine | var_1 | median / p99 / max | K var_K / var_1 | 90 % at K=8 | error K=1 | error K=R "
        "| clipped 1/8/32 |\n|---|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as base:
        for family in ("moe", "dense"):
            model = save_model(Path(base) / family, family)
            exact = (await measure(model, "float32", texts, 1))[0]
            dtypes: tuple[Dtype, ...] = ("bfloat16", "float16", "float32")
            for dtype in dtypes:
                found = await measure(model, dtype, texts, args.repeats)
                print(line(Row(f"{family} {dtype}", found), exact), flush=True)
                if family == "moe" and dtype == "bfloat16":
                    copies = np.repeat(found[:1], args.repeats, 0)
                    print(line(Row("moe bfloat16, copies of one", copies), exact), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=64)
    torch.set_num_threads(1)
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
