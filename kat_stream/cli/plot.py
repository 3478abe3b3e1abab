"""`kat-stream plot RUN`: reward and held-out pass rate as a picture and a page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kat_stream.cli.common import Where, add_command, add_log_options, add_run_argument, where

if TYPE_CHECKING:
    from kat_stream.observe.state import RunState


def register(subparsers: Any) -> None:
    parser = add_command(
        subparsers,
        "plot",
        plot,
        help="draw reward and held-out pass rate of a run",
        description="Writes plot.png and plot.html into the run's folder: both against optimizer steps and against "
        "wall time. The page is one file that needs nothing else, with the numbers as tables. It may be "
        "done while the run goes on.",
        examples=["plot latest", "plot runs/mine --log kafka:localhost:9092"],
    )
    add_run_argument(parser)
    add_log_options(parser)


def plot(args: argparse.Namespace) -> int:
    import anyio

    from kat_stream.observe.plot import write_plots

    place = where(args)
    for path in write_plots(anyio.run(_collect, place), place.run_dir or Path()):
        print(path)
    return 0


async def _collect(place: Where) -> RunState:
    from kat_stream.observe.sources import read_records
    from kat_stream.observe.state import RunState

    async with place.source() as source:
        state = RunState(run=source.run)
        async for record, timestamp_ms in read_records(source):
            state.apply(record, timestamp_ms)
    return state
