"""Tree training against its rivals, and against what the saved work allows.

    python -m tests.benchmarks.trees                        # stars of POR 0.2 to 0.95, nodes of 128 tokens or more
    python -m tests.benchmarks.trees --sessions             # recorded agent sessions (tests/benchmarks/sessions.json)
    python -m tests.benchmarks.trees --device cuda --attention flash

POR = 1 - unique / flat tokens. Of each shape, one optimizer step as
  packed      the baseline: every path apart, an own causal attention call each (`tree_rivals`), packed to the budget
  tree        each unique token once, the whole tree at once
  parts       the same in parts with gateways, --budget unique tokens at once
  split       trees of whole paths within the budget: a prefix is computed once a tree
  padded      such a trie filled up to the budget, under an N x N mask
interleaved in one process, medians. All start from the same weights and must report the same losses.
Bounds on the speed-up over `packed`: `tokens` and `pairs` are its work over the tree's; `bound` composes them by costs
measured on plain packed sequences in the same run: seconds = fixed + a * tokens + b * pairs + c * vocabulary rows.
`share` = speed-up / bound. On one CPU thread all of it is the process's CPU time, which other load disturbs little;
wall time is given beside it. Memory: growth of the resident set over a step; on a GPU the allocator's peak.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from kat_stream.training.learner import LearnerConfig, TorchLearner
from kat_stream.trees import TrainBatch, TurnTokens, concat, partition, with_path
from tests.benchmarks.tree_rivals import CAUSAL, apart, as_batch, filled, in_groups
from tests.benchmarks.tree_shapes import SESSIONS, VOCABULARY, Shape, grown, longest, star

HEAD = 32
WHOLE = 10**9


@dataclass(slots=True)
class Clock:
    """Seconds of the process's CPU, or of the wall."""

    device: str
    cpu: bool

    def measure(self, work: Callable[[], object]) -> tuple[float, float]:
        """(seconds by this clock, seconds of the wall)."""
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        spent = time.perf_counter() - wall
        return (time.process_time() - cpu if self.cpu else spent), spent


def trim() -> None:
    """Give freed memory back, and let the peak begin at what is resident now."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def resident(name: str) -> float:
    """MiB of VmRSS or VmHWM."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


@dataclass(slots=True)
class Run:
    name: str
    learner: TorchLearner
    batch: TrainBatch
    seconds: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    mib: float = 0.0
    loss: float = 0.0
    """Of the first step."""
    peak_tokens: int = 0

    def warm(self, device: str) -> None:
        """The first step: its loss and its memory, not its time (the heap is handed back before it)."""
        if device == "cpu":
            trim()
            before = resident("VmRSS")
        else:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() / 2**20
        metrics = self.learner.step(self.batch)
        peak = resident("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated() / 2**20
        self.mib, self.loss, self.peak_tokens = peak - before, metrics.loss, metrics.peak_tokens

    def step(self, clock: Clock) -> None:
        seconds, wall = clock.measure(lambda: self.learner.step(self.batch))
        self.seconds.append(seconds)
        self.wall.append(wall)


def work(batch: TrainBatch) -> np.ndarray:
    """float64[4]: (1, tokens, query-key pairs, vocabulary rows), what the cost model is linear in."""
    pairs = sum(int((row.pos.astype(np.int64) + 1).sum()) for row in batch.rows)
    return np.array([1, batch.tree_tokens, pairs, sum(len(np.unique(row.parent[row.index])) for row in batch.rows)])


@dataclass(slots=True)
class Bench:
    directory: Path
    args: argparse.Namespace
    clock: Clock

    def learner(self, budget: int, attention: str) -> TorchLearner:
        config = LearnerConfig(
            micro_batch_tokens=budget,
            attention="segments" if attention == CAUSAL else attention,  # type: ignore[arg-type]
            device=self.args.device,
            learning_rate=1e-5,
        )
        learner = TorchLearner(self.directory, config)
        if attention == CAUSAL:
            learner.model.set_attn_implementation(CAUSAL)
        return learner

    def packed(self, turns: Sequence[TurnTokens], advantages: Sequence[float], budget: int) -> Run:
        attention = CAUSAL if self.args.device == "cpu" else self.args.attention
        return Run("packed", self.learner(budget, attention), apart(as_batch(turns, advantages, budget)))

    def costs(self) -> np.ndarray:
        """float64[4]: seconds a step, token, pair and vocabulary row, from plain sequences of four shapes."""
        runs = []
        for paths, length, sampled in ((16, 256, 64), (2, 2048, 64), (16, 256, 8), (2, 256, 64)):
            turns = grown([[-1, 0, length - sampled, sampled]] * paths, np.random.default_rng(0))
            runs.append(self.packed(turns, [1.0] * paths, 4096))
        for run in runs:
            run.warm(self.args.device)
        for _ in range(self.args.calibrate):
            for run in runs:
                run.step(self.clock)
        left = np.array([work(run.batch) for run in runs])
        found: np.ndarray = np.linalg.solve(left, [median(run.seconds) for run in runs])
        named = zip(found * [1e3, 1e6, 1e9, 1e6], ("ms a step", "us a token", "ns a pair", "us a row"), strict=True)
        print("costs:", ", ".join(f"{value:.3g} {what}" for value, what in named), flush=True)
        return found

    def compare(self, title: str, groups: Sequence[Sequence[TurnTokens]], budget: int, costs: np.ndarray) -> None:
        turns = [turn for group in groups for turn in group]
        advantages = np.random.default_rng(1).standard_normal(len(turns)).tolist()
        planning, _ = self.clock.measure(lambda: partition(concat(as_batch(turns, advantages, WHOLE).rows), budget))
        tree = as_batch(turns, advantages, budget)
        split = in_groups(turns, advantages, budget)
        attention = self.args.attention
        runs = [
            self.packed(turns, advantages, budget),
            Run("tree", self.learner(WHOLE, attention), tree),
            Run("parts", self.learner(budget, attention), tree),
            Run("split", self.learner(budget, attention), split),
            Run("padded", self.learner(budget, "dense"), filled(split, budget)),
        ]
        for run in runs:
            run.warm(self.args.device)
        rounds = 0
        began = time.perf_counter()
        while rounds < self.args.rounds[0] or (
            rounds < self.args.rounds[1] and (time.perf_counter() - began) * (rounds + 1) / rounds < self.args.seconds
        ):
            for run in runs:
                run.step(self.clock)
            rounds += 1
        report(title, runs, costs, budget, planning)


def gateway_mib(batch: TrainBatch, budget: int, learner: TorchLearner) -> tuple[int, float]:
    """Parts, and MiB of the keys and values that a part sees of its path, at most, and their gradients."""
    config = learner.model.config
    row = concat(batch.rows)
    parts = partition(row, budget)
    above = max(with_path(row, part)[1] for part in parts)
    size = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    return len(parts), 2 * above * size / 2**20


def report(title: str, runs: Sequence[Run], costs: np.ndarray, budget: int, planning: float) -> None:
    base, tree = work(runs[0].batch), work(runs[1].batch)
    bound = float(base @ costs / (tree @ costs))
    parts, gateways = gateway_mib(runs[1].batch, budget, runs[1].learner)
    print(
        f"\n{title}: {base[1]} flat, {tree[1]} unique tokens (POR {1 - tree[1] / base[1]:.2f}); tokens "
        f"{base[1] / tree[1]:.2f}, pairs {base[2] / tree[2]:.2f}, bound {bound:.2f}; budget {budget}, planned in "
        f"{planning * 1e3:.0f} ms, {parts} parts, gateways {gateways:.1f} MiB; load {os.getloadavg()[0]:.0f}"
    )
    for run in runs:
        if abs(run.loss - runs[0].loss) > 1e-3 * max(abs(runs[0].loss), 0.01):
            raise SystemExit(f"{run.name} has loss {run.loss}, packed {runs[0].loss}")
        speed, wall = (median(a) / median(b) for a, b in ((runs[0].seconds, run.seconds), (runs[0].wall, run.wall)))
        print(
            f"  {run.name:7s}{median(run.seconds):9.3f} s  x{speed:6.2f}  share {100 * speed / bound:6.1f} %"
            f"  (wall x{wall:.2f})  {run.batch.tree_tokens - tree[1]:7.0f} redundant  {run.peak_tokens:7d} live tokens"
            f"  {run.mib:7.0f} MiB  n={len(run.seconds)}",
            flush=True,
        )


def model_dir(directory: Path, args: argparse.Namespace) -> Path:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // HEAD,
        num_key_value_heads=args.hidden // HEAD,
        head_dim=HEAD,
        tie_word_embeddings=True,
        max_position_embeddings=65536,
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)
    return directory


def stars(bench: Bench, args: argparse.Namespace, costs: np.ndarray) -> None:
    for por in args.por:
        shape = star(por, args.node)
        flat = len(shape) * longest(shape)
        rng = np.random.default_rng(0)
        groups = [grown(shape, rng, number=number) for number in range(-(-args.flat // flat))]
        bench.compare(f"POR {por}", groups, _budget(longest(shape), args), costs)


def sessions(bench: Bench, args: argparse.Namespace, costs: np.ndarray) -> None:
    for session in json.loads(SESSIONS.read_text()):
        shape: Shape = session["turns"]
        shrink = max(session["ids_a_token"], longest(shape) / args.longest)
        turns = grown(shape, np.random.default_rng(0), shrink)
        depth = max(len(turn.prompt_ids) + len(turn.sampled_ids) for turn in turns)
        title = f"{session['agent']}: {len(turns)} turns, ids / {shrink:.1f}"
        bench.compare(title, [turns], _budget(depth, args), costs)


def _budget(depth: int, args: argparse.Namespace) -> int:
    """Unique tokens at once; a path must fit, for the sake of those that cannot cut one."""
    return max(args.budget, -(-depth // 128) * 128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--por", type=float, nargs="*", default=[0.2, 0.4, 0.6, 0.8, 0.9, 0.95])
    parser.add_argument("--sessions", action="store_true", help="recorded sessions in place of stars")
    parser.add_argument("--longest", type=int, default=4096, help="tokens of a path that sessions are scaled down to")
    parser.add_argument("--node", type=int, default=128, help="tokens of a node, at least")
    parser.add_argument("--flat", type=int, default=8192, help="flat tokens of a step, at least")
    parser.add_argument("--budget", type=int, default=2048, help="unique tokens at once, at least the longest path")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, nargs=2, default=[2, 7], help="of a shape, at least and at most")
    parser.add_argument("--seconds", type=float, default=25.0, help="of a shape, unless fewer rounds")
    parser.add_argument("--calibrate", type=int, default=8, help="steps of each shape that gives the costs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--attention", default="segments")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = Clock(args.device, cpu=args.device == "cpu" and args.threads == 1)
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(model_dir(Path(name), args), args, clock)
        size = sum(p.numel() for p in bench.learner(1, args.attention).model.parameters()) / 1e6
        print(f"{size:.1f} M parameters, {args.device}, {args.threads} threads, {args.attention}")
        (sessions if args.sessions else stars)(bench, args, bench.costs())


if __name__ == "__main__":
    main()
