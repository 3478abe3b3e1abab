"""`kat-stream dead-letters`: what a stage could not use."""

from __future__ import annotations

import argparse
from typing import Any

from kat_stream.cli.common import Where, add_command, add_group, add_log_options, add_run_option, where


def register(subparsers: Any) -> None:
    group = add_group(
        subparsers,
        "dead-letters",
        help="messages that a stage could not use",
        description="A message that cannot be read or handled is written to dead.letters byte for byte, and the "
        "stage goes on.",
    )
    parser = add_command(
        group,
        "list",
        list_,
        help="each dead letter with where it came from and why",
        description="Prints one line for each: its source (topic, partition/offset), the stage, the error and its "
        "size.",
        examples=["dead-letters list", "dead-letters list --json --log kafka:localhost:9092"],
    )
    parser.add_argument("--json", action="store_true", help="whole records, one JSON object a line")
    add_run_option(parser)
    add_log_options(parser)


def list_(args: argparse.Namespace) -> int:
    import anyio

    count = anyio.run(_list, args, where(args))
    if not count and not args.json:
        print("no dead letters")
    return 0


async def _list(args: argparse.Namespace, place: Where) -> int:
    """Those of every run: what could not be decoded does not say whose it was."""
    from kat_stream.observe.tail import json_line, line

    count = 0
    async with place.source() as source:
        async for delivered in source.messages(("dead.letters",)):
            print(json_line(delivered) if args.json else line(delivered))
            count += 1
    return count
