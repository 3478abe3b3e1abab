"""`kat-stream tail TOPIC`: records as they come, one line each."""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from kat_stream.cli.common import Where, add_command, add_log_options, add_run_option, count, where

if TYPE_CHECKING:
    from kat_stream.log import Delivered
    from kat_stream.observe.sources import LogSource, Source

POLL_S = 0.5


def register(subparsers: Any) -> None:
    parser = add_command(
        subparsers,
        "tail",
        tail,
        help="records of a topic, one line each, as they come",
        description="Reads a topic without joining any group: watching never disturbs a run. On a live Kafka log it "
        "goes on until Ctrl-C, from the newest record on (--from latest) or from the first one. A run "
        "on the in-memory log is read from its archive, which its archiver writes every few seconds; "
        "then it ends.",
        examples=[
            "tail trajectories",
            "tail turns --from earliest -n 20",
            "tail rewards --json --log kafka:localhost:9092 | jq .value.score",
            "tail turns --rollout 20260101-120000-s0-t000012-3",
        ],
    )
    parser.add_argument("topic", metavar="TOPIC", help="see: kat-stream topics list")
    parser.add_argument(
        "--from",
        dest="start",
        choices=("earliest", "latest"),
        help="the first record, or the newest (default: latest on a live log, earliest on an archive)",
    )
    parser.add_argument("--rollout", metavar="ID", default="", help="only records that speak of this rollout")
    parser.add_argument("--json", action="store_true", help="whole records as JSON, token arrays as numbers")
    stop = "stop after N records; with --from latest on an archive, the last N"
    parser.add_argument("-n", type=count, metavar="N", help=stop)
    add_run_option(parser)
    add_log_options(parser)


def tail(args: argparse.Namespace) -> int:
    import anyio

    from kat_stream.errors import ConfigError
    from topics import CATALOGUE

    names = [topic.name for topic in CATALOGUE]
    if args.topic not in names:
        raise ConfigError(f"no topic `{args.topic}`; there are: {', '.join(names)}")
    with suppress(KeyboardInterrupt):  # the way a tail ends
        anyio.run(_tail, args, where(args))
    return 0


async def _tail(args: argparse.Namespace, place: Where) -> None:
    from kat_stream.observe.sources import LogSource
    from kat_stream.observe.tail import json_line, line

    show: Callable[[Delivered], str] = json_line if args.json else line
    async with place.source() as source:
        if isinstance(source, LogSource):
            async for delivered in _live(source, args):
                print(show(delivered), flush=True)
            return
        for delivered in await _archived(source, args):
            print(show(delivered))


async def _live(source: LogSource, args: argparse.Namespace) -> AsyncIterator[Delivered]:
    """Until N records were given, or for ever."""
    given = 0
    async with source.log.follow((args.topic,), start=args.start or "latest") as follower:
        while args.n is None or given < args.n:
            for delivered in await follower.poll(POLL_S):
                if _wanted(delivered, source, args.rollout) and (args.n is None or given < args.n):
                    given += 1
                    yield delivered


async def _archived(source: Source, args: argparse.Namespace) -> list[Delivered]:
    """By time: a person reads a story, not partitions."""
    found = [one async for one in source.messages((args.topic,)) if _wanted(one, source, args.rollout)]
    found.sort(key=lambda one: (one.timestamp_ms, one.position))
    if args.n is None:
        return found
    return found[max(0, len(found) - args.n) :] if args.start == "latest" else found[: args.n]


def _wanted(delivered: Delivered, source: Source, rollout_id: str) -> bool:
    from kat_stream.errors import DecodeError
    from kat_stream.observe.tail import rollouts_of

    try:
        record = delivered.record()
    except DecodeError:
        return not rollout_id  # shown as unreadable
    return source.run in ("", record.run) and (not rollout_id or rollout_id in rollouts_of(record))
