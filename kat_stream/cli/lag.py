"""`kat-stream lag`: how far each stage of a run is behind."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from kat_stream.cli.common import add_command, add_log_options, broker_log, port, table

if TYPE_CHECKING:
    from kat_stream.log import Log
    from kat_stream.log.lag import Lag

WATCH_S = 2.0


def register(subparsers: Any) -> None:
    parser = add_command(
        subparsers,
        "lag",
        lag,
        help="how far each stage is behind, in messages and seconds",
        description="Prints for each stage of a run and each topic how many messages are not finished yet, and how old "
        "the oldest of them is. The trainer counts from the positions of its newest step, the archiver from its files. "
        "Work that is done beyond a slow message is not lag; delay tiers in which nothing waits are left out. "
        "Reading it disturbs nobody. With --log and no RUN, all "
        "consumer groups on that broker. `kat-stream run` exports the same as kat_lag_messages and kat_lag_seconds; "
        "where services are started one by one, --serve does. A run on the in-memory log shows its lag in its own "
        "progress view.",
        examples=[
            "lag",
            "lag mine --watch",
            "lag mine --serve 9105                        as metrics, beside services that were started one by one",
            "lag --log kafka:localhost:9092",
            "lag --json | jq '.[] | select(.seconds > 60)'",
        ],
    )
    parser.add_argument("run", metavar="RUN", nargs="?", default="", help="a run's folder, its name, or `latest`")
    parser.add_argument("--watch", action="store_true", help=f"again every {WATCH_S:g} s, until Ctrl-C")
    serve = "export /metrics on this port (0: any), listed among the run's Prometheus targets, until Ctrl-C"
    parser.add_argument("--serve", type=port, metavar="PORT", help=serve)
    form = "a list of {group, topic, messages, seconds, partitions}"
    parser.add_argument("--json", action="store_true", help=form)
    add_log_options(parser)


def lag(args: argparse.Namespace) -> int:
    import anyio

    anyio.run(_lag if args.serve is None else _serve, args)
    return 0


async def _serve(args: argparse.Namespace) -> None:
    """With the log that the run's folder names, or another address of it."""
    import anyio

    from kat_stream.errors import ConfigError
    from kat_stream.observe.lag_export import MEMBER, serve_lag
    from kat_stream.runs import find_run, load_run
    from kat_stream.service import Context
    from kat_stream.signals import stop_on_signal

    if args.watch or args.json:
        raise ConfigError("--serve prints nothing: leave out --watch and --json")
    run_dir = find_run(args.run or "latest")
    config = load_run(run_dir)
    log = broker_log(args)
    await log.start()
    ctx = Context(config=config, run=config.run.name, run_dir=run_dir, log=log, member=MEMBER)
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(stop_on_signal, ctx.stopping)
            await serve_lag(ctx, args.serve)
            group.cancel_scope.cancel()
    finally:
        with anyio.CancelScope(shield=True):
            await log.close()


async def _lag(args: argparse.Namespace) -> None:
    import anyio

    from kat_stream.errors import DeadlineExceeded, LogUnavailable

    log = broker_log(args)
    await log.start()
    try:
        _show(await _ask(log, args), args.json)
        while args.watch:
            await anyio.sleep(WATCH_S)
            try:
                _show(await _ask(log, args), args.json)
            except (LogUnavailable, DeadlineExceeded) as error:  # who watches wants to see it come back
                print(f"lag is not known: {error}", file=sys.stderr, flush=True)
    finally:
        with anyio.CancelScope(shield=True):
            await log.close()


async def _ask(log: Log, args: argparse.Namespace) -> list[Lag]:
    from kat_stream.log.lag import lags
    from kat_stream.observe.stage_lag import stage_lags
    from kat_stream.runs import find_run, load_run

    if not args.run and (args.log or args.config or args.set):
        return await lags(log, ages=True)
    run_dir = find_run(args.run or "latest")
    return await stage_lags(log, load_run(run_dir).run.name, run_dir)


def _show(found: Iterable[Lag], as_json: bool) -> None:
    import json
    from dataclasses import asdict

    from kat_stream.log.retries import TIERS

    found = [lag for lag in found if lag.messages or lag.topic not in TIERS]
    if as_json:
        rows = [{**asdict(lag), "messages": lag.messages, "seconds": lag.seconds} for lag in found]
        print(json.dumps(rows), flush=True)
        return
    lines = [(lag.group, lag.topic, str(lag.messages), f"{lag.seconds or 0:.1f}", _worst(lag)) for lag in found]
    head = ("STAGE", "TOPIC", "MESSAGES", "SECONDS", "OLDEST IN")
    print(table([head, *lines]) if lines else "no consumer groups", flush=True)


def _worst(lag: Lag) -> str:
    """Where the oldest unfinished message is."""
    if not lag.messages:
        return "-"
    oldest = max(lag.partitions, key=lambda partition: partition.seconds or 0.0)
    return f"partition {oldest.partition} at {oldest.first}"
