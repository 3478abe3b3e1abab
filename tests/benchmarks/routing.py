"""How far the learner is from the engine with and without routing replay: `python -m tests.benchmarks.routing`.

A mixture of experts is sampled by the embedded engine, all turns at once (co-batches change as requests end), and the
float32 learner computes the log-probs of the same tokens, routed by itself or as the engine recorded. `decisions`: same
experts in a layer; `tokens`: in every layer; gap: |log-prob of the learner - of the engine| a token, in nats; clipped:
turns whose product ratio is outside 1 +- 0.2 although nothing was learned.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
from dataclasses import replace
from pathlib import Path

import aiohttp
import numpy as np
import torch

from kat_stream.engines.client import EngineClient, SamplingParams
from kat_stream.engines.embedded import start_engine
from kat_stream.engines.embedded.runner import Dtype
from kat_stream.training.learner import LearnerConfig, TorchLearner
from kat_stream.trees import TrainBatch, TurnTokens, make_batch
from kat_stream.trees.batch import take_rows
from kat_stream.trees.layout import MISSING
from tests.benchmarks.mcla import BAND, CALL_S, PROMPT, SAMPLED, VOCAB, save_model

REPLAY = LearnerConfig(micro_batch_tokens=4096, routing_replay=True)


async def sample(model: Path, dtype: Dtype, turns: int) -> TrainBatch:
    """So many turns of SAMPLED tokens, each of its own prompt."""
    chance = random.Random(3)
    prompts = [[chance.randrange(VOCAB) for _ in range(PROMPT)] for _ in range(turns)]
    server = await start_engine(
        model, model_name="m", max_total_tokens=32768, max_running=32, dtype=dtype, record_routing=True
    )
    async with aiohttp.ClientSession() as session:
        engine = EngineClient(server.url, session, record_routing=True)

        async def one(number: int) -> TurnTokens:
            params = SamplingParams(max_new_tokens=SAMPLED, temperature=1.0, ignore_eos=True, sampling_seed=number)
            made = await engine.generate(prompts[number], params, rid=f"{number}", routed_from=0, deadline_s=CALL_S)
            routes = np.frombuffer(made.routed_experts, "<u2").reshape(PROMPT + SAMPLED - 1, -1)
            ids = np.array(prompts[number], np.int32), np.array(made.output_ids, np.int32)
            return TurnTokens(f"{number}", *ids, np.array(made.logprobs, np.float32), routes=(routes,))

        found = await asyncio.gather(*(one(number) for number in range(turns)))
    await server.close()
    ones = np.ones(turns)
    names = [turn.turn_id for turn in found]
    return make_batch(
        found, rollout=np.arange(turns), advantage=ones, weight=ones, rollout_ids=names, budget_tokens=4096
    )


def agreement(learner: TorchLearner, batch: TrainBatch) -> tuple[float, float]:
    """Share of recorded decisions, and of tokens in all layers, for which the learner itself chose those experts."""
    chosen: list[torch.Tensor] = []
    routers = [layer.mlp.gate for layer in learner.model.model.layers]
    hooks = [router.register_forward_hook(lambda module, args, output: chosen.append(output[2])) for router in routers]
    same = []
    for number, row in enumerate(batch.rows):
        chosen.clear()
        learner.logprobs(take_rows(batch, [number]))
        own = torch.stack(chosen, 1).sort(-1).values.numpy()
        assert row.routes is not None
        recorded = np.sort(row.routes.reshape(own.shape), axis=-1)
        known = row.routes[:, 0] != MISSING
        same.append((own == recorded).all(-1)[known])
    for hook in hooks:
        hook.remove()
    joined = np.concatenate(same)
    return float(joined.mean()), float(joined.all(1).mean())


def line(name: str, learner: TorchLearner, batch: TrainBatch) -> str:
    gap = learner.logprobs(batch) - batch.logprobs
    ratio = np.exp(gap.reshape(-1, SAMPLED).sum(1))
    clipped = float((np.abs(ratio - 1) > BAND).mean())
    size = np.abs(gap)
    return f"| {name} | {size.mean():.1e} | {np.quantile(size, 0.99):.1e} | {size.max():.1e} | {clipped:.1%} |"


async def run(turns: int) -> None:
    print("| engine, learner | mean gap | p99 | max | clipped |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as base:
        model = save_model(Path(base) / "moe", "moe")
        dtypes: tuple[Dtype, ...] = ("bfloat16", "float16", "float32")
        for dtype in dtypes:
            batch = await sample(model, dtype, turns)
            own, replayed = (TorchLearner(model, replace(REPLAY, routing_replay=on)) for on in (False, True))
            decisions, tokens = agreement(own, batch)
            print(line(f"{dtype}, own routing (decisions {decisions:.2%}, tokens {tokens:.2%})", own, batch))
            print(line(f"{dtype}, replay", replayed, batch), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=64)
    torch.set_num_threads(1)
    asyncio.run(run(parser.parse_args().turns))


if __name__ == "__main__":
    main()
