"""How a run's progress looks: a panel for a terminal, plain lines for everything else. Pure: state in, words out.

Invariant: a line is given once for each step and for each completed evaluation, in the order of the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan

from rich.console import RenderableType
from rich.panel import Panel
from rich.table import Table

from kat_stream.observe.state import RoundView, RunState
from kat_stream.observe.steps import StepView
from kat_stream.observe.text import number, percent, sparkline

SPARK_WIDTH = 48


class Lines:
    """Remembers what was told."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._step = 0
        self._graded: dict[int, int] = {}

    def new(self, state: RunState, now_ms: int) -> list[str]:
        """Lines for steps and completed evaluations that were not told before."""
        lines = []
        for round_ in state.rounds:
            # A request that was published late reopens its round: it is told again with the larger number.
            if round_.complete and round_.requested > self._graded.get(round_.round, 0):
                self._graded[round_.round] = round_.requested
                lines.append(round_line(round_))
        for step in state.steps:
            if step.step > self._step:
                self._step = step.step
                lines.append(step_line(step, self.steps, state, now_ms))
        return lines


def step_line(step: StepView, steps: int, state: RunState, now_ms: int) -> str:
    """One optimizer step on one line."""
    stale = f"{number(step.staleness_mean, 1)} (max {number(step.staleness_max, 0)})"
    rates = f"{state.tokens_per_s(now_ms):.0f} tokens/s, {state.in_flight} rollouts in flight"
    numbers = f"reward {number(step.reward)}, loss {number(step.loss, 4)}, clipped {number(step.clip_fraction)}"
    times = f"{number(step.seconds, 1)} s, at {duration(step.wall_s)}"
    return f"step {step.step}/{steps}: {numbers}, staleness {stale}, {rates}, {times}"


def round_line(round_: RoundView) -> str:
    """One evaluation on one line."""
    failed = f", {round_.failed} not graded" if round_.failed else ""
    solved = f"{round_.passed} of {round_.graded} held-out tasks{failed}"
    rate = f"pass rate {number(round_.pass_rate)} ({solved})"
    return f"evaluation at step {round_.round}: {rate}, at {duration(round_.wall_s)}"


def duration(seconds: float) -> str:
    """`m:ss`, or `h:mm:ss` from an hour on."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def panel(state: RunState, steps: int, lag: Mapping[str, int], now_ms: int) -> RenderableType:
    """The live view. `lag`: messages still to read, by topic."""
    made = state.steps
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", style="dim", no_wrap=True)
    table.add_column(no_wrap=True, overflow="ellipsis")
    for name, value in _rows(state, made, lag, now_ms):
        table.add_row(name, value)
    done = f"step {made[-1].step if made else 0} of {steps}"
    elapsed = duration(max(0.0, (now_ms - state.first_ms) / 1000)) if state.first_ms else "0:00"
    return Panel(table, title=f"{state.run or 'run'}  {done}  {elapsed}", title_align="left", border_style="blue")


def _rows(state: RunState, made: Sequence[StepView], lag: Mapping[str, int], now_ms: int) -> list[tuple[str, str]]:
    asked = state.requested
    finished = asked - state.in_flight
    return [
        ("reward", _reward(made)),
        ("held-out", _held_out(state.rounds)),
        ("rollouts", f"{state.in_flight} in flight, {finished} of {asked} ended"),
        ("tokens/s", f"{state.tokens_per_s(now_ms):.0f} sampled, {state.sampled_tokens} in all"),
        ("policy", state.version or "-"),
        *(_of_step(made[-1]) if made else [("step", "waiting for the first groups")]),
        ("lag", ", ".join(f"{topic} {n}" for topic, n in sorted(lag.items()) if n) or "none"),
    ]


def _of_step(step: StepView) -> list[tuple[str, str]]:
    ratio = step.flat_tokens / step.tree_tokens if step.tree_tokens else float("nan")
    return [
        ("step time", f"{number(step.seconds, 2)} s, {step.tree_tokens} tokens, {number(ratio, 2)}x fewer than flat"),
        ("loss", f"{number(step.loss, 4)}, clipped {percent(step.clip_fraction)}"),
        ("staleness", f"mean {number(step.staleness_mean, 2)}, max {number(step.staleness_max, 0)} versions"),
    ]


def _reward(made: Sequence[StepView]) -> str:
    rewards = [step.reward for step in made]
    known = [reward for reward in rewards if not isnan(reward)]
    return f"{known[-1]:.3f}  {sparkline(rewards, SPARK_WIDTH)}" if known else "-"


def _held_out(rounds: Sequence[RoundView]) -> str:
    if not rounds:
        return "-"
    rates = " -> ".join(number(round_.pass_rate) for round_ in rounds if round_.graded) or "-"
    last = rounds[-1]
    running = "" if last.complete else f"  (step {last.round}: {last.graded + last.failed} of {last.requested})"
    return rates + running
