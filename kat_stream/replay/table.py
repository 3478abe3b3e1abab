"""Recorded and remade side by side: as a table for a terminal and as a picture.

Invariant: numbers that are compared are printed with all their digits where they may differ in the last one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kat_stream.errors import ConfigError
from topics import TrainStep

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COMPARED = ("loss", "grad_norm", "clip_fraction", "entropy")
"""Of `training.metrics.StepMetrics`."""
COLOURS = ("#4c78a8", "#e45756")
Row = tuple[str, ...]


def one_step(recorded: Mapping[str, float], remade: Mapping[str, float]) -> list[Row]:
    """A line for each compared metric, with whether the bits are equal."""
    rows: list[Row] = [("", "recorded", "replayed", "")]
    for name in COMPARED:
        was, now = recorded.get(name), remade.get(name)
        verdict = "equal to the bit" if was == now else "differs"
        rows.append((name, _exact(was), _exact(now), verdict))
    return rows


def many_steps(run: Sequence[TrainStep], shadow: Sequence[TrainStep], most: int) -> list[Row]:
    """The newest `most` steps that both have made: each metric of the run, then of the shadow."""
    theirs = {(step.lineage, step.step): step.metrics for step in run}
    head = ("step", *(f"{name} {whose}" for name in COMPARED for whose in ("run", "shadow")))
    rows: list[Row] = [head]
    for step in shadow[-most:]:
        was = theirs.get((step.lineage, step.step), {})
        cells = (_short(metrics.get(name)) for name in COMPARED for metrics in (was, step.metrics))
        rows.append((str(step.step), *cells))
    return rows


def draw(run: Sequence[TrainStep], shadow: Sequence[TrainStep], file: Path) -> None:
    """A panel for each compared metric; `ConfigError` if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ConfigError(f"to draw plots, install kat-stream[ui] ({error.name} is missing)") from error
    figure = Figure(figsize=(11, 6), layout="constrained")
    for axes, name in zip(figure.subplots(2, 2).flat, COMPARED, strict=True):
        _panel(axes, name, run, shadow)
    figure.savefig(file, dpi=144)


def _panel(axes: Axes, name: str, run: Sequence[TrainStep], shadow: Sequence[TrainStep]) -> None:
    for steps, label, colour in zip((run, shadow), ("run", "shadow"), COLOURS, strict=True):
        known = [step for step in steps if name in step.metrics]
        axes.plot([step.step for step in known], [step.metrics[name] for step in known], color=colour, label=label)
    axes.set_title(name, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)


def _exact(value: float | None) -> str:
    return "-" if value is None else repr(value)


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
