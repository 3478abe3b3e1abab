"""`kat-stream run CONFIG`: a whole system, to the end of its schedule."""

from __future__ import annotations

import argparse
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from kat_stream.cli.common import add_command

if TYPE_CHECKING:
    from kat_stream.config import Config
    from kat_stream.execute import Result

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells use it."""
LOSSES = "kat_stream.losses"


def register(subparsers: Any) -> None:
    parser = add_command(
        subparsers,
        "run",
        run,
        help="run a whole system: sampling, sandboxes, grading, training",
        description="Starts every service of the configuration and runs until its schedule is done. log.url = memory: "
        "runs all in this process; kafka:host:port runs one process a service under a supervisor. What the "
        "configuration names (model, tasks, agents, sandbox, loss, log) is looked for first. The exit code is 130 "
        "after Ctrl-C.",
        examples=[
            "run my.toml                        a run of its own under runs/",
            "run my.toml --set run.steps=100 --set trainer.learning_rate=4e-4",
            "run my.toml --dry-run              print the complete configuration and stop",
            "run --resume latest                go on from the newest checkpoint of a run",
        ],
    )
    parser.add_argument("config", nargs="?", type=Path, help="TOML file; without it, the defaults")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one setting")
    parser.add_argument("--resume", metavar="RUN", help="go on with this run: a folder, a name or `latest`")
    parser.add_argument("--dry-run", action="store_true", help="print the complete configuration and stop")


def run(args: argparse.Namespace) -> int:
    from kat_stream.config import load
    from kat_stream.errors import ConfigError
    from kat_stream.runs import create_run, find_run, load_run

    if args.resume:
        if args.config or args.set:
            raise ConfigError("--resume takes its configuration from the run's folder; leave CONFIG and --set out")
        run_dir = find_run(args.resume)
        config = load_run(run_dir)
        if args.dry_run:
            return _print(config)
        with _broker_of(config.log.url):
            return conduct("run", config, run_dir, resume=True)
    config = load(args.config, args.set)
    if args.dry_run:
        return _print(config)
    check_parts(config)
    config, run_dir = create_run(config)
    return conduct("run", config, run_dir, resume=False)


def check_parts(config: Config) -> None:
    """Whether what a configuration names is there, before a run has a folder; ConfigError if not."""
    from kat_stream.env.datasets import open_dataset
    from kat_stream.env.plugins import load, names
    from kat_stream.env.scaffolds.registry import check_scaffolds
    from kat_stream.log import open_log
    from kat_stream.policy import model_dir
    from kat_stream.sandboxing import open_backend

    open_log(config.log.url, security=config.log.security, blobs=config.blobs.url)
    model_dir(config.policy.model)
    check_scaffolds((config.data.scaffold, *config.sampler.scaffold))
    open_dataset(config.data.train)
    open_dataset(config.data.held_out)
    open_backend(config.rollout)
    if config.trainer.loss not in names(LOSSES):  # one that is there is not loaded: it imports torch
        load(LOSSES, config.trainer.loss)


def _print(config: Config) -> int:
    from kat_stream.config import check_training, dump

    check_training(config)
    print(dump(config), end="")
    return 0


def _broker_of(url: str) -> AbstractContextManager[object]:
    """If the run's log is this machine's own broker (`kat-stream broker up`), it runs meanwhile."""
    from kat_stream.cli.broker import STATE_DIR, running_meanwhile
    from kat_stream.log import broker

    bootstrap = broker.status(STATE_DIR).bootstrap
    return running_meanwhile() if bootstrap and url == f"kafka:{bootstrap}" else nullcontext()


def conduct(title: str, config: Config, run_dir: Path, *, resume: bool) -> int:
    """Execute, show progress, leave plots, and close with one line."""
    from kat_stream.execute import execute
    from kat_stream.observe.progress import Progress
    from kat_stream.policy import model_dir
    from kat_stream.runs import reopen_run, worked_on
    from kat_stream.telemetry import setup_logging

    with worked_on(run_dir):
        model_dir(config.policy.model)
        if resume:
            config = reopen_run(run_dir)
        (run_dir / "logs").mkdir(exist_ok=True)
        setup_logging(file=run_dir / "logs" / "run.log")
        with Progress(steps=config.run.steps) as progress:
            result = anyio.run(lambda: execute(config, run_dir, resume=resume, progress=progress))
        return close(title, result, run_dir)


def close(title: str, result: Result, run_dir: Path) -> int:
    """The last words of a run, and its exit code."""
    from kat_stream.observe.plot import write_plots
    from kat_stream.observe.sources import archived_state

    if result.interrupted and result.error is None:  # who pressed Ctrl-C waits for no picture and no whole archive
        steps = archived_state(run_dir, ("train.steps",)).steps_done
        print(f"{title}: stopped at step {steps}; go on with: kat-stream run --resume {run_dir}")
        return INTERRUPTED
    state = archived_state(run_dir)
    write_plots(state, run_dir)
    if result.error is not None:
        print(f"{title}: stopped: {result.error}", file=sys.stderr)
        print(f"{title}: log {run_dir}/logs; go on with: kat-stream run --resume {run_dir}", file=sys.stderr)
        return 1
    print(f"{title}: {summary(state)}, {result.seconds:.0f} s, run {run_dir}")
    return 0


def summary(state: Any) -> str:
    """`held-out pass rate 0.38 -> 0.91, 40 steps, 2560 rollouts`."""
    rounds = [view for view in state.rounds if view.graded]
    rates = f"held-out pass rate {rounds[0].pass_rate:.2f} -> {rounds[-1].pass_rate:.2f}, " if rounds else ""
    return f"{rates}{state.steps_done} steps, {state.train_rollouts} rollouts"
