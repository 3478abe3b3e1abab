"""What a person sees while a run goes on, and the plots that it leaves."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import anyio
import pytest
from rich.console import Console

from kat_stream.config import Config
from kat_stream.log import MemoryLog
from kat_stream.observe.plot import moving_mean, wilson, write_plots
from kat_stream.observe.progress import Progress
from kat_stream.observe.state import RunState
from kat_stream.observe.text import sparkline
from kat_stream.observe.view import Lines, duration, panel
from kat_stream.service import Context
from tests import observe_kit as fab
from tests.observe_kit import FabricatedRun
from topics import CATALOGUE

LINES = [
    "evaluation at step 0: pass rate 0.333 (1 of 3 held-out tasks, 1 not graded), at 0:02",
    "evaluation at step 2: pass rate 0.750 (3 of 4 held-out tasks), at 0:12",
    "step 1/40: reward 0.667, loss -0.0100, clipped 0.050, staleness 0.0 (max 0), 6 tokens/s, "
    "1 rollouts in flight, 0.8 s, at 0:04",
    "step 2/40: reward 0.667, loss -0.0200, clipped 0.050, staleness 1.0 (max 1), 6 tokens/s, "
    "1 rollouts in flight, 0.8 s, at 0:07",
]


def reduced(run: Any) -> RunState:
    state = RunState()
    for record, timestamp_ms in run.records:
        state.apply(record, timestamp_ms)
    return state


def test_a_line_a_step_and_a_line_an_evaluation_each_once(small_run: FabricatedRun) -> None:
    state, lines = reduced(small_run), Lines(40)
    assert lines.new(state, state.last_ms) == LINES
    assert lines.new(state, state.last_ms) == []


def test_a_round_that_grew_is_told_again() -> None:
    run = fab.FabricatedRun()
    run.evaluation(0, ["passed"])
    lines, state = Lines(40), reduced(run)
    assert lines.new(state, state.last_ms)[0].startswith("evaluation at step 0: pass rate 1.000 (1 of 1")
    run.evaluation(0, ["passed", "not passed"])
    state = reduced(run)
    assert lines.new(state, state.last_ms)[0].startswith("evaluation at step 0: pass rate 0.500 (1 of 2")


def test_the_panel_shows_what_matters(small_run: FabricatedRun) -> None:
    state = reduced(small_run)
    console = Console(file=io.StringIO(), width=110)
    console.print(panel(state, 40, {"turns": 3, "rewards": 0}, state.last_ms))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for words in (
        "demo  step 2 of 40",
        "0.333 -> 0.750",
        "1 in flight, 19 of 20 ended",
        "a.2",
        "turns 3",
        "mean 1.00, max 1",
    ):
        assert words in shown, words
    assert "rewards 0" not in shown


def test_an_empty_run_has_a_panel_too() -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(panel(RunState(), 40, {}, 0))
    assert "waiting for the first groups" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_follows_the_log_and_shows_everything_before_it_ends(
    small_run: FabricatedRun, tmp_path: Path, terminal: bool
) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100)
    progress = Progress(steps=40, console=console)

    async def watch() -> None:
        log = MemoryLog()
        await log.start()
        await log.apply_topics(CATALOGUE)
        ctx = Context(config=Config(), run="demo", run_dir=tmp_path, log=log, member="run")
        async with anyio.create_task_group() as group:
            group.start_soon(progress.follow, ctx)
            await log.publish(*(record for record, _ in small_run.records))
            with anyio.fail_after(10):
                await progress.catch_up()
            group.cancel_scope.cancel()
        await log.close()

    with progress:
        anyio.run(watch)
    assert progress.state.steps_done == 2
    assert progress.state.requested == 20
    shown = out.getvalue()
    wanted = "0.333 -> 0.750" if terminal else "evaluation at step 2: pass rate 0.750"
    assert wanted in shown


def test_plots_are_written_and_the_page_needs_nothing_else(small_run: FabricatedRun, tmp_path: Path) -> None:
    png, html = write_plots(reduced(small_run), tmp_path)
    assert png.read_bytes().startswith(b"\x89PNG")
    page = html.read_text()
    assert page.count("<svg") == 1
    assert "<td>0.333</td>" in page
    assert "Held-out pass rate 0.333 → 0.750; 2 steps, 11 training rollouts, 0:12." in page
    links = re.findall(r'(?:src|href)="(?!#)([^"]+)"', page)
    assert links == []


def test_a_run_without_steps_can_be_plotted(tmp_path: Path) -> None:
    png, html = write_plots(RunState(run="<empty>"), tmp_path)
    assert png.stat().st_size > 0
    assert "&lt;empty&gt;" in html.read_text()


def test_numbers_of_the_plot() -> None:
    assert moving_mean([1.0, 0.0, 2.0], 2) == [1.0, 0.5, 1.0]
    # Wilson's interval of 8 in 10 at 95 %, as in Newcombe 1998.
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 5)[0] == 0.0
    assert wilson(5, 5)[1] == 1.0
    assert duration(59.9) == "0:59"
    assert duration(3725) == "1:02:05"
    assert sparkline([0.0, 0.5, float("nan"), 1.0]) == "▁▄ █"
