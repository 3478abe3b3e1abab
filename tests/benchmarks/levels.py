"""The demo's policy trained with token-, turn- and sequence-level ratios, on trees and on every path apart.

    python -m tests.benchmarks.levels --seeds 0 1 2                  # 18 runs, one after the other
    python -m tests.benchmarks.levels --seeds 0 --steps 3            # a try
    python -m tests.benchmarks.levels --draw                         # the picture of what is there

Each run is the demo without evaluations in between, in a process of its own; its rewards and seconds a step go to the
JSON file (--out) when it has ended, and what is there already is not run again: it may be interrupted and called again.
`linear` differs from `tree` in one thing: before each optimizer step the batch's trees become a row for each path.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

LEVELS = ("token", "turn", "sequence")
FORMS = ("tree", "linear")
SMOOTH = 5
COLOURS = {"token": "#4c78a8", "turn": "#e45756", "sequence": "#54a24b"}
Results = dict[str, dict[str, Any]]


def one(level: str, form: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One run in this process."""
    from kat_stream.cli.demo import CONFIG
    from kat_stream.cli.run import conduct
    from kat_stream.config import load
    from kat_stream.observe.sources import archived_state
    from kat_stream.runs import create_run
    from kat_stream.training.learner import TorchLearner
    from kat_stream.training.metrics import StepMetrics
    from kat_stream.trees import TrainBatch
    from tests.benchmarks.tree_rivals import apart

    whole = TorchLearner.step

    def step(self: TorchLearner, batch: TrainBatch, should_stop: Callable[[], bool] = lambda: False) -> StepMetrics:
        return whole(self, apart(batch), should_stop)

    if form == "linear":
        TorchLearner.step = step  # type: ignore[method-assign]
    settings = [
        f"run.seed={seed}",
        f"run.steps={args.steps}",
        f"run.directory={args.runs}",
        f"run.name=levels-{os.getpid()}",
        f"trainer.level={level}",
        "sampler.eval_every=0",
        "data.held_out=mend:held-out?count=8&seed=0",
    ]
    config, run_dir = create_run(load(CONFIG, settings))
    if conduct("levels", config, run_dir, resume=False):
        raise SystemExit(1)
    steps = archived_state(run_dir).steps
    taught = [step for step in steps if step.tree_tokens]
    return {
        "rewards": [round(step.reward, 4) for step in steps],
        "seconds": [round(step.seconds, 4) for step in taught],
        "tokens": [step.tree_tokens for step in taught],
        "load": round(os.getloadavg()[0], 1),
        "wall_s": round(steps[-1].wall_s, 1),
    }


def run_all(args: argparse.Namespace) -> None:
    for seed in args.seeds:
        for level in LEVELS:
            for form in FORMS:
                name = f"{level} {form} {seed} {args.steps}"
                if name not in _read(args.out):
                    command = [sys.executable, "-m", "tests.benchmarks.levels", "--one", level, form, str(seed)]
                    for option in ("steps", "out", "runs"):
                        command += [f"--{option}", str(getattr(args, option))]
                    subprocess.run(command, check=True)


def _read(path: Path) -> Results:
    found: Results = json.loads(path.read_text()) if path.exists() else {}
    return found


def table(results: Results, steps: int) -> None:
    """Per level: the reward of the last quarter of each form, and what a step costs."""
    print("level     form    seeds  reward, last quarter (lowest .. highest)  s a step, median  tokens a step")
    for level in LEVELS:
        for form in FORMS:
            runs = _of(results, level, form, steps)
            if not runs:
                continue
            ends = [mean(run["rewards"][-max(steps // 4, 1) :]) for run in runs]
            seconds = median(value for run in runs for value in run["seconds"])
            tokens = median(value for run in runs for value in run["tokens"])
            print(
                f"{level:9s} {form:7s} {len(runs):5d}  {mean(ends):.3f} ({min(ends):.3f} .. {max(ends):.3f})"
                f"{seconds:32.3f}{tokens:15.0f}"
            )


def _of(results: Results, level: str, form: str, steps: int) -> list[Mapping[str, Any]]:
    wanted = (level, form, str(steps))
    return [run for name, run in results.items() if (*name.split()[:2], name.split()[3]) == wanted]


def draw(results: Results, steps: int, path: Path) -> None:
    """Reward against steps, mean over seeds and the band between the lowest and the highest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, level in zip(figure.subplots(1, 3, sharey=True), LEVELS, strict=True):
        for form, style in zip(FORMS, ("-", "--"), strict=True):
            curves = [_smooth(run["rewards"]) for run in _of(results, level, form, steps)]
            if curves:
                columns = list(zip(*curves, strict=True))
                at = range(1, len(columns) + 1)
                axes.plot(at, [mean(column) for column in columns], style, color=COLOURS[level], label=form)
                axes.fill_between(
                    at, [min(c) for c in columns], [max(c) for c in columns], color=COLOURS[level], alpha=0.12
                )
        axes.set_title(f"{level}-level ratio", loc="left", fontsize=10)
        axes.set_xlabel("optimizer step")
        if axes.lines:
            axes.legend(frameon=False, fontsize=9, loc="lower right")
    figure.axes[0].set_ylabel(f"reward, mean of {SMOOTH} steps")
    figure.savefig(path, dpi=144)


def _smooth(values: Sequence[float]) -> list[float]:
    return [mean(values[max(0, end - SMOOTH) : end]) for end in range(1, len(values) + 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path(".kat/levels.json"))
    parser.add_argument("--plot", type=Path, default=Path("docs/levels.png"))
    parser.add_argument("--runs", type=Path, default=Path(".kat/levels"))
    parser.add_argument("--draw", action="store_true", help="run nothing")
    parser.add_argument("--one", nargs=3, metavar=("LEVEL", "FORM", "SEED"), help="this run alone, without a picture")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.one:
        level, form, seed = args.one
        found = one(level, form, int(seed), args)
        results = _read(args.out) | {f"{level} {form} {seed} {args.steps}": found}
        args.out.write_text(json.dumps(results, indent=1) + "\n")
        return
    if not args.draw:
        run_all(args)
    results = _read(args.out)
    table(results, args.steps)
    draw(results, args.steps, args.plot)


if __name__ == "__main__":
    main()
