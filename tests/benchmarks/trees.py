"""Tree training against its rivals.

    python -m tests.benchmarks.trees [--por 0.5 0.9] [--device cuda] [--attention flash]

For each potential overlap ratio (POR = 1 - unique / flat tokens): seconds of one optimizer step of
  tree        the whole tree at once
  parts       the tree in parts with gateways, --budget unique tokens at once
  packed      the baseline: every path apart (one that is a prefix of another is merged), packed to the budget
  split       naive split: groups of whole paths, each group a tree of its own, as large as the budget
  dense       the trie as one row under an N x N mask (not padded)
and next to each its speed-up over `packed` and the share of the work bound on it that is reached. Bounds: `tokens` =
flat / unique, `pairs` = the same of query-key pairs, `work` = both, weighted by the model's FLOPs (vocabulary rows
are not shared). Back ends run interleaved in one process, best of --steps. Memory: peak live tokens; on a GPU also
MiB.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from kat_stream.training.learner import LearnerConfig, TorchLearner
from kat_stream.training.metrics import StepMetrics
from kat_stream.trees import TrainBatch, TurnTokens, build_forest, concat, make_batch, merge, partition

VOCABULARY, HEAD = 2048, 32


@dataclass(frozen=True, slots=True)
class Shape:
    """Of the model."""

    hidden: int
    layers: int

    def flops(self, tokens: int, pairs: int, rows: int) -> float:
        """Forward and backward: 6 a weight and token, 12 a pair and head element, and the vocabulary's rows."""
        weights = self.layers * (4 * self.hidden**2 + 3 * self.hidden * 3 * self.hidden)
        return 6 * weights * tokens + 12 * self.layers * self.hidden * pairs + 6 * self.hidden * VOCABULARY * rows


def synthetic(por: float, paths: int, length: int, sampled: int) -> list[TurnTokens]:
    """`paths` siblings of `length` tokens under one prompt, as long as the POR asks for."""
    rng = np.random.default_rng(0)
    shared = round(length * por * paths / (paths - 1))
    if not 0 < shared <= length - sampled:
        raise SystemExit(f"POR {por} needs more than {paths} paths of {length} tokens with {sampled} sampled ones")
    prompt = rng.integers(0, VOCABULARY, shared)
    turns = []
    for number in range(paths):
        path = np.concatenate([prompt, [number], rng.integers(0, VOCABULARY, length - shared - 1)]).astype(np.int32)
        logprobs = np.full(sampled, -7.6, np.float32)
        turns.append(TurnTokens(str(number), path[:-sampled], path[-sampled:], logprobs))
    return turns


def as_batch(turns: Sequence[TurnTokens], advantages: Sequence[float], budget: int) -> TrainBatch:
    ones = np.ones(len(turns))
    names = [turn.turn_id for turn in turns]
    return make_batch(
        turns, rollout=np.arange(len(turns)), advantage=advantages, weight=ones, rollout_ids=names, budget_tokens=budget
    )


def in_groups(turns: Sequence[TurnTokens], advantages: Sequence[float], budget: int, *, alone: bool) -> TrainBatch:
    """Rows of consecutive paths: each path apart, or as many together as still fit as one tree."""
    groups: list[list[int]] = []
    for number in range(len(turns)):
        together = [*(groups[-1] if groups else []), number]
        size = sum(len(tree) for tree in build_forest([turns[i] for i in together]).trees)
        if groups and not alone and size <= budget:
            groups[-1] = together
        else:
            groups.append([number])
    return merge([as_batch([turns[i] for i in g], [advantages[i] for i in g], budget) for g in groups])


def model_dir(directory: Path, shape: Shape, positions: int) -> Path:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden,
        intermediate_size=3 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // HEAD,
        num_key_value_heads=shape.hidden // HEAD,
        head_dim=HEAD,
        tie_word_embeddings=True,
        max_position_embeddings=positions,
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)
    return directory


@dataclass(slots=True)
class Run:
    name: str
    learner: TorchLearner
    batch: TrainBatch
    best: StepMetrics | None = None
    mib: float = 0.0

    def step(self) -> None:
        cuda = self.learner.config.device.startswith("cuda")
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        metrics = self.learner.step(self.batch)
        if cuda:
            self.mib = torch.cuda.max_memory_allocated() / 2**20
        if self.best is None or metrics.seconds < self.best.seconds:
            self.best = metrics


def work(shape: Shape, batch: TrainBatch) -> tuple[int, int, float]:
    """(tokens, pairs, FLOPs) of a batch as its rows say."""
    rows = [len(np.unique(row.parent[row.index])) for row in batch.rows]
    pairs = sum(int((row.pos.astype(np.int64) + 1).sum()) for row in batch.rows)
    return batch.tree_tokens, pairs, shape.flops(batch.tree_tokens, pairs, sum(rows))


def compare(por: float, shape: Shape, args: argparse.Namespace, directory: Path) -> None:
    turns = synthetic(por, args.paths, args.length, args.sampled)
    advantages = np.random.default_rng(1).standard_normal(len(turns)).tolist()
    tree = as_batch(turns, advantages, 10**9)
    packed = in_groups(turns, advantages, args.budget, alone=True)
    split = in_groups(turns, advantages, args.budget, alone=False)

    def learner(budget: int, attention: str) -> TorchLearner:
        config = LearnerConfig(micro_batch_tokens=budget, attention=attention, device=args.device)  # type: ignore[arg-type]
        return TorchLearner(directory, config)

    runs = [
        Run("packed", learner(args.budget, args.attention), packed),
        Run("tree", learner(10**9, args.attention), tree),
        Run("parts", learner(args.budget, args.attention), tree),
        Run("split", learner(args.budget, args.attention), split),
        Run("dense", learner(10**9, "dense"), tree),
    ]
    for _ in range(args.steps + 1):
        for run in runs:
            run.step()
    report(por, shape, runs, len(partition(concat(tree.rows), args.budget)))


def report(por: float, shape: Shape, runs: Sequence[Run], parts: int) -> None:
    base, tree = work(shape, runs[0].batch), work(shape, runs[1].batch)
    tokens, pairs, flops = (b / t for b, t in zip(base, tree, strict=True))
    bounds = f"tokens {tokens:.2f}, pairs {pairs:.2f}, work {flops:.2f}"
    print(f"\nPOR {por:.2f}: {base[0]} flat, {tree[0]} unique tokens; bounds: {bounds}")
    first = runs[0].best
    assert first is not None
    for run in runs:
        assert run.best is not None
        speed = first.seconds / run.best.seconds
        redundant = run.batch.tree_tokens - tree[0]
        note = f", {parts} parts" if run.name == "parts" else ""
        memory = f", {run.mib:.0f} MiB" if run.mib else ""
        print(
            f"  {run.name:7s} {run.best.seconds * 1e3:9.1f} ms  x{speed:5.2f}  {100 * speed / flops:5.1f} % of bound"
            f", {redundant} redundant, {run.best.peak_tokens} live tokens{memory}{note}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--por", type=float, nargs="*", default=[0.2, 0.5, 0.8, 0.9, 0.95])
    parser.add_argument("--paths", type=int, default=24)
    parser.add_argument("--length", type=int, default=2048, help="tokens of a path")
    parser.add_argument("--sampled", type=int, default=64, help="trained tokens of a path")
    parser.add_argument("--budget", type=int, default=4096, help="unique tokens at once, of packed, parts and split")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--attention", default="segments")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shape = Shape(args.hidden, args.layers)
    print(f"model: hidden {args.hidden}, {args.layers} layers; {args.device}, {args.threads} threads, {args.attention}")
    with tempfile.TemporaryDirectory() as name:
        directory = model_dir(Path(name), shape, args.length)
        for por in args.por:
            compare(por, shape, args, directory)


if __name__ == "__main__":
    main()
