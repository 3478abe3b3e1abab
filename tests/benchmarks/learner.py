"""Learner benchmark: `python tests/benchmarks/learner.py [--threads 1] [--micro 4096 ...]`; best of five steps.

Prints the time of one optimizer step on a batch like the demo's, and of building and packing its trees.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from kat_stream.rl.aggregation import turn_weights
from kat_stream.training.learner import LearnerConfig, TorchLearner
from kat_stream.trees import TrainBatch, TurnTokens, build_forest, make_batch, merge


def group(rng: np.random.Generator, rollouts: int = 8, turns: int = 3, prompt: int = 40) -> TrainBatch:
    """`rollouts` paths that share a prompt; each turn is ~12 sampled tokens and ~48 of output."""
    root = rng.integers(0, 1000, prompt).astype(np.int32)
    made: list[TurnTokens] = []
    owner: list[int] = []
    for rollout in range(rollouts):
        path = root
        for turn in range(turns):
            sampled = rng.integers(0, 1000, rng.integers(6, 18)).astype(np.int32)
            logprobs = np.full(len(sampled), -6.9, np.float32)
            made.append(TurnTokens(f"{rollout}.{turn}", path, sampled, logprobs))
            owner.append(rollout)
            output = rng.integers(0, 1000, rng.integers(20, 76)).astype(np.int32)
            path = np.concatenate([path, sampled, output])
    advantage = rng.standard_normal(rollouts)[owner]
    weight = turn_weights(owner, [len(turn.sampled_ids) for turn in made], aggregation="trajectory", level="turn")
    names = [str(i) for i in range(rollouts)]
    return make_batch(made, rollout=owner, advantage=advantage, weight=weight, rollout_ids=names, budget_tokens=4096)


def model_dir(directory: Path, hidden: int, layers: int) -> Path:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        head_dim=32,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)
    return directory


def time_steps(learner: TorchLearner, batch: TrainBatch, count: int = 5) -> list[float]:
    return sorted(learner.step(batch).seconds for _ in range(count))


def time_forest(flat_tokens: int) -> tuple[float, int]:
    """Seconds to build the forest of about `flat_tokens` tokens in paths of 1000."""
    rng = np.random.default_rng(1)
    base = rng.integers(0, 1000, 900).astype(np.int32)
    turns = []
    for number in range(flat_tokens // 1000):
        prompt = base.copy()
        cut = int(rng.integers(1, 900))
        prompt[cut:] = rng.integers(0, 1000, 900 - cut)
        sampled = rng.integers(0, 1000, 100).astype(np.int32)
        turns.append(TurnTokens(str(number), prompt, sampled, np.full(100, -1, np.float32)))
    began = time.perf_counter()
    trees = build_forest(turns)
    return time.perf_counter() - began, sum(len(tree) for tree in trees)


def describe(path: Path, batch: TrainBatch, config: LearnerConfig, threads: int) -> str:
    learner = TorchLearner(path, config)
    size = sum(p.numel() for p in learner.model.parameters()) / 1e6
    seconds = time_steps(learner, batch)
    return (
        f"step: {size:.2f} M parameters, {threads} threads, micro-batch {config.micro_batch_tokens}, "
        f"{config.attention}: best {seconds[0]:.2f} s, median {seconds[2]:.2f} s, "
        f"{batch.tree_tokens / seconds[0]:.0f} tokens/s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--micro", type=int, nargs="*", default=[2048, 4096, 8192])
    arguments = parser.parse_args()
    threads = arguments.threads
    torch.set_num_threads(threads)
    seconds, unique = time_forest(1_000_000)
    print(f"forest: 1.0 M flat tokens -> {unique} unique in {seconds:.2f} s")
    batch = merge([group(np.random.default_rng(k)) for k in range(16)])
    print(f"batch: {batch.tree_tokens} unique, {batch.flat_tokens} flat, {batch.trained_tokens} sampled tokens")
    for hidden, layers in ((128, 2), (192, 3)):
        with tempfile.TemporaryDirectory() as name:
            path = model_dir(Path(name), hidden, layers)
            for micro in arguments.micro:
                print(describe(path, batch, LearnerConfig(micro_batch_tokens=micro), threads))
            print(describe(path, batch, LearnerConfig(micro_batch_tokens=2048, attention="dense"), threads))


if __name__ == "__main__":
    main()
