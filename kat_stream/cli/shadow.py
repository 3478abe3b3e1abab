"""`kat-stream shadow RUN --name NAME`: a second learner on the data of a run, with another loss or seed."""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kat_stream.cli.common import add_command, add_run_argument, table
from kat_stream.cli.replay import add_remake_options, changed
from kat_stream.errors import ConfigError, KatError

if TYPE_CHECKING:
    import anyio

    from kat_stream.observe.sources import Source
    from kat_stream.replay.shadow import Shadow
    from topics import TrainStep

ROWS = 20
PAUSE_S = 2.0


def register(subparsers: Any) -> None:
    parser = add_command(
        subparsers,
        "shadow",
        shadow,
        help="train on a run's batches with another loss or seed, without touching the run",
        description="Makes every step of a run on the very batches that the run used, while it goes on or afterwards, "
        "with other settings of the learner, in the folder RUN.shadow-NAME. It only reads the run's log or archive: an "
        "access list that permits reading is enough. It ends with the run's last step, with Ctrl-C, or when no step "
        "came for trainer.step_timeout_s; the same command goes on from its own checkpoints. While the run lives it "
        "waits for a log that is away. At the end it prints both side by side and draws plot.png. --seed changes the "
        "order in which groups are summed: what differs then is rounding, the yardstick for every other difference.",
        examples=[
            "shadow latest --name token --set trainer.level=token",
            "shadow runs/mine --name noise --seed 1",
            "shadow runs/mine --name slow --set trainer.learning_rate=3e-4 --log kafka:localhost:9092",
        ],
    )
    add_run_argument(parser)
    parser.add_argument("--name", required=True, metavar="NAME", help="letters, digits, - and _")
    parser.add_argument("--seed", type=int, metavar="N", help="another order of summation (default: the run's)")
    add_remake_options(parser)


def shadow(args: argparse.Namespace) -> int:
    import anyio

    from kat_stream.replay.shadow import Asked, Shadow
    from kat_stream.replay.table import draw, many_steps
    from kat_stream.runs import find_run
    from kat_stream.training.settings import digest, learner_config

    if not re.fullmatch(r"[\w-]+", args.name):
        raise ConfigError(f"--name {args.name}: letters, digits, - and _")
    run_dir = find_run(args.run)
    config = changed(run_dir, args.set)
    asked = Asked(
        run=config.run.name,
        name=args.name,
        seed=config.run.seed if args.seed is None else args.seed,
        settings=tuple(args.set),
        learner_sha256=digest(learner_config(config)),
    )
    follower = Shadow(run_dir.with_name(f"{run_dir.name}.shadow-{args.name}"), config, asked, _told)
    follower.open()
    why, recorded = anyio.run(_follow, follower, run_dir, args.log)
    made = follower.made()
    print(table(many_steps(recorded, made, ROWS)))
    draw(recorded, made, follower.directory / "plot.png")
    print(f"shadow: {why}; {len(made)} steps, {follower.directory}")
    return 0


def _told(step: TrainStep) -> None:
    loss = step.metrics.get("loss")
    print(f"step {step.step}: {'nothing to learn' if loss is None else f'loss {loss:.6g}'}", flush=True)


async def _follow(shadow: Shadow, run_dir: Path, url: str) -> tuple[str, list[TrainStep]]:
    """Why it ended, and the run's own steps."""
    import anyio

    from kat_stream.signals import stop_on_signal

    stopping = anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(stop_on_signal, stopping)
        found = await _patiently(shadow, run_dir, url, stopping)
        group.cancel_scope.cancel()
    return found


async def _patiently(shadow: Shadow, run_dir: Path, url: str, stopping: anyio.Event) -> tuple[str, list[TrainStep]]:
    """Through an outage of a living run's log that is no longer than a step may take; then the archive has to do."""
    import anyio

    from kat_stream.observe.sources import open_source
    from kat_stream.runs import seems_live

    config = shadow.config
    made, grown = len(shadow.made()), time.monotonic()
    while not stopping.is_set():
        patient = seems_live(run_dir) and time.monotonic() - grown < config.trainer.step_timeout_s
        try:
            async with open_source(run_dir, url, config.log.security, archive_will_do=not patient) as source:
                return await _through(shadow, source, stopping)
        except KatError as error:
            if not (error.retriable and patient):
                raise
            print(f"shadow: {error}; trying again in {PAUSE_S:g} s", file=sys.stderr, flush=True)
        if len(shadow.made()) != made:
            made, grown = len(shadow.made()), time.monotonic()
        with anyio.move_on_after(PAUSE_S):
            await stopping.wait()
    return "stopped", []


async def _through(shadow: Shadow, source: Source, stopping: anyio.Event) -> tuple[str, list[TrainStep]]:
    from kat_stream.observe.sources import read_records
    from kat_stream.replay.history import History

    print(f"shadow of {source.run}, from {source.where}", flush=True)
    why = await shadow.follow(source, stopping)
    history = History()
    async for record, _ in read_records(source, ("train.steps",)):
        history.apply(record)
    return why, history.survivors()
