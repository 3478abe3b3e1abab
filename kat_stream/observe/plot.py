"""Reward and held-out pass rate of a run, against steps and against wall time: plot.png and plot.html in its folder.

Invariant: the page is one file without a link to anything else, and shows the same points as the picture and their
numbers as tables.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from html import escape
from math import isnan, sqrt
from pathlib import Path
from typing import TYPE_CHECKING

from kat_stream.errors import ConfigError
from kat_stream.observe.state import RoundView, RunState
from kat_stream.observe.steps import StepView
from kat_stream.observe.text import number
from kat_stream.observe.view import duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REWARD, PASS_RATE, GRID, INK = "#4c78a8", "#e45756", "#e6e6e6", "#333333"
SMOOTH = 5
"""Steps that the moving mean of the reward is taken over."""
Z_95 = 1.96
STYLE = """body{font:15px/1.5 system-ui,sans-serif;color:#333;max-width:1080px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.4rem;margin:0}p{margin:.3rem 0 1rem}svg{width:100%;height:auto}
h2{font-size:1.05rem;margin:1.5rem 0 .3rem}
table{border-collapse:collapse}td,th{padding:.15rem .9rem .15rem 0;text-align:right;font-variant-numeric:tabular-nums}
th{font-weight:500;color:#777;border-bottom:1px solid #ddd}"""


def write_plots(state: RunState, run_dir: Path) -> tuple[Path, Path]:
    """Write plot.png and plot.html into the run's folder; ConfigError if matplotlib is not installed."""
    figure = draw(state)
    png, html = run_dir / "plot.png", run_dir / "plot.html"
    figure.savefig(png, dpi=144)
    svg = io.StringIO()
    figure.savefig(svg, format="svg")
    html.write_text(page(state, svg.getvalue()))
    return png, html


def draw(state: RunState) -> Figure:
    """The picture: one panel against optimizer steps, one against minutes."""
    try:
        from matplotlib.figure import Figure  # without pyplot: no window system and no global state
    except ModuleNotFoundError as error:
        raise ConfigError(f"to draw plots, install kat-stream[ui] ({error.name} is missing)") from error
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    steps, rounds = state.steps, [round_ for round_ in state.rounds if round_.graded]
    left, right = figure.subplots(1, 2, sharey=True)
    _panel(left, steps, rounds, lambda step: step.step, lambda round_: round_.round)
    _panel(right, steps, rounds, lambda step: step.wall_s / 60, lambda round_: round_.wall_s / 60)
    left.set_xlabel("optimizer step")
    right.set_xlabel("wall time (minutes)")
    left.set_ylabel("reward, pass rate")
    left.set_title(state.run or "run", loc="left", color=INK, fontsize=11)
    left.legend(frameon=False, fontsize=9, loc="lower right")
    return figure


def page(state: RunState, svg: str) -> str:
    """A page that needs nothing but itself."""
    title = escape(f"kat-stream run {state.run}")
    picture = svg[svg.index("<svg") :]
    rounds = _table(("after step", "pass rate", "passed", "graded", "not graded", "at"), map(_round_row, state.rounds))
    columns = ("step", "reward", "loss", "clipped", "staleness", "trained", "left out", "seconds", "at")
    steps = _table(columns, map(_step_row, state.steps))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f"<style>{STYLE}</style></head>\n<body><h1>{title}</h1>\n<p>{escape(_headline(state))}</p>\n{picture}\n"
        f"<h2>Held-out evaluations</h2>\n{rounds}\n<h2>Optimizer steps</h2>\n{steps}\n</body></html>\n"
    )


def _headline(state: RunState) -> str:
    rollouts = f"{state.steps_done} steps, {state.train_rollouts} training rollouts, {duration(state.seconds)}"
    graded = [round_ for round_ in state.rounds if round_.graded]
    rates = " → ".join(number(round_.pass_rate) for round_ in graded)
    return f"Held-out pass rate {rates}; {rollouts}." if graded else f"{rollouts}."


def _panel(
    axes: Axes,
    steps: Sequence[StepView],
    rounds: Sequence[RoundView],
    step_x: Callable[[StepView], float],
    round_x: Callable[[RoundView], float],
) -> None:
    known = [step for step in steps if not isnan(step.reward)]
    xs, rewards = [step_x(step) for step in known], [step.reward for step in known]
    axes.plot(xs, rewards, "o", color=REWARD, alpha=0.35, markersize=3.5, markeredgewidth=0, label="reward of a step")
    axes.plot(xs, moving_mean(rewards, SMOOTH), color=REWARD, linewidth=1.8, label=f"mean of {SMOOTH} steps")
    rates = [round_.pass_rate for round_ in rounds]
    at, bars = [round_x(round_) for round_ in rounds], _bars(rounds)
    axes.errorbar(at, rates, yerr=bars, color=PASS_RATE, marker="D", markersize=5, linewidth=1.2, elinewidth=0.9,
                  capsize=2.5, label="held-out pass rate, 95 % interval")  # fmt: skip
    for x, rate in zip(at, rates, strict=True):
        axes.annotate(f"{rate:.2f}", (x, rate), (6, 6), textcoords="offset points", color=PASS_RATE, fontsize=9)
    _quiet(axes)


def _quiet(axes: Axes) -> None:
    """No ink that says nothing."""
    axes.set_ylim(-0.02, 1.05)
    axes.margins(x=0.06)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#bbbbbb")
    axes.tick_params(colors=INK, labelsize=9, length=3)


def moving_mean(values: Sequence[float], width: int) -> list[float]:
    """The mean of each value and up to `width - 1` before it."""
    windows = (values[max(0, end - width) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]


def wilson(passed: int, graded: int) -> tuple[float, float]:
    """The 95 % interval of a pass rate (Wilson's score interval); `graded` > 0."""
    rate, square = passed / graded, Z_95**2
    middle = (rate + square / (2 * graded)) / (1 + square / graded)
    half = Z_95 * sqrt(rate * (1 - rate) / graded + square / (4 * graded**2)) / (1 + square / graded)
    return max(0.0, middle - half), min(1.0, middle + half)


def _bars(rounds: Sequence[RoundView]) -> list[list[float]]:
    """Lengths of the error bars: [below, above]."""
    ends = [(round_.pass_rate, *wilson(round_.passed, round_.graded)) for round_ in rounds]
    return [[max(0.0, rate - low) for rate, low, _ in ends], [max(0.0, high - rate) for rate, _, high in ends]]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = ("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{cells}</tr>\n" + "\n".join(lines) + "</table>"


def _round_row(view: RoundView) -> tuple[str, ...]:
    counts = (view.passed, view.graded, view.failed)
    return (str(view.round), number(view.pass_rate), *map(str, counts), duration(view.wall_s))


def _step_row(view: StepView) -> tuple[str, ...]:
    stale = f"{number(view.staleness_mean, 1)} (max {number(view.staleness_max, 0)})"
    numbers = (number(view.reward), number(view.loss, 4), number(view.clip_fraction), stale)
    rollouts = (str(view.trained), str(view.filtered))
    return (str(view.step), *numbers, *rollouts, number(view.seconds, 2), duration(view.wall_s))
