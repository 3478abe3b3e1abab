"""`kat-stream tail TOPIC`: records as they come, one line each."""

from __future__ import annotations

import argparse
import select
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from kat_stream.cli.common import Where, add_command, add_log_options, add_run_option, count, where

if TYPE_CHECKING:
    from kat_stream.log import Delivered
    from kat_stream.observe.sources import LogSource, Source

POLL_S = 0.5
QUIET_S = 5.0
"""After so long without a record the log is asked whether it is there at all ..."""
ANSWER_S = 10.0
"""... and this is how long it may take to answer: longer than a node of several that stands still holds it up."""


def register(subparsers: Any) -> None:
    parser = add_command(
        subparsers,
        "tail",
        tail,
        help="records of a topic, one line each, as they come",
        description="Reads a topic without joining any group: watching never disturbs a run. On a live Kafka log it "
        "goes on until Ctrl-C, from the newest record on (--from latest) or from the first one; a log that goes away "
        "meanwhile is waited for. A run on the in-memory log is read from its archive, which its archiver writes every "
        "few seconds; then it ends.",
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
    """Until N records were given, or for ever: a reader does not notice by itself that nobody answers, or listens."""
    given, answered, heard = 0, True, time.monotonic()
    async with source.log.follow((args.topic,), start=args.start or "latest") as follower:
        while args.n is None or given < args.n:
            found = await follower.poll(POLL_S)
            if found or time.monotonic() - heard > QUIET_S:
                there = bool(found) or await _answers(source, args.topic)
                if there != answered:
                    said = "answers again" if there else "does not answer; tail waits for it, Ctrl-C ends"
                    print(f"kat-stream tail: {source.where} {said}", file=sys.stderr, flush=True)
                answered, heard = there, time.monotonic()
            if _reader_gone():
                raise BrokenPipeError
            for delivered in found:
                if _wanted(delivered, source, args.rollout) and (args.n is None or given < args.n):
                    given += 1
                    yield delivered


def _reader_gone() -> bool:
    """Whether stdout is a pipe that nobody reads any more (`| head`): by itself it shows only at the next record."""
    stdout = select.poll()
    stdout.register(1, 0)
    return bool(stdout.poll(0))


async def _answers(source: LogSource, topic: str) -> bool:
    """Whether the log is there."""
    import anyio

    from kat_stream.errors import LogUnavailable

    try:
        with anyio.fail_after(ANSWER_S):
            await source.log.end_offsets(topic)
    except (LogUnavailable, TimeoutError):
        return False
    return True


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
