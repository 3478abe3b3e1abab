"""`kat-stream dead-letters`: what a stage could not use, and putting it back once the cause is mended."""

from __future__ import annotations

import argparse
from typing import Any

from kat_stream.cli.common import (
    Where,
    add_command,
    add_group,
    add_log_options,
    add_run_option,
    broker_log,
    duration,
    where,
)


def register(subparsers: Any) -> None:
    group = add_group(
        subparsers,
        "dead-letters",
        help="messages that a stage could not use",
        description="A message that cannot be read or handled is written to dead.letters byte for byte, and the "
        "stage goes on. A stage that cannot use most of what it reads stops instead.",
    )
    _register_list(group)
    _register_show(group)
    _register_replay(group)


def _register_list(group: Any) -> None:
    parser = add_command(
        group,
        "list",
        list_,
        help="each dead letter with where it came from and why",
        description="Prints one line for each: its source (topic, partition/offset), the stage, the error and its "
        "size. The number after the slash of the second column is the letter's ID. A line `Replayed` marks a letter "
        "that was put back.",
        examples=["dead-letters list", "dead-letters list --json --log kafka:localhost:9092"],
    )
    parser.add_argument("--json", action="store_true", help="whole records, one JSON object a line")
    add_run_option(parser)
    add_log_options(parser)


def _register_show(group: Any) -> None:
    parser = add_command(
        group,
        "show",
        show,
        help="one dead letter: reason, headers, bytes, and the record as far as it can be read",
        description="ID is what `dead-letters list` prints after the slash of its second column.",
        examples=["dead-letters show 17", "dead-letters show 17 --log kafka:localhost:9092"],
    )
    parser.add_argument("id", metavar="ID", type=int)
    add_run_option(parser)
    add_log_options(parser)


def _register_replay(group: Any) -> None:
    parser = add_command(
        group,
        "replay",
        replay,
        help="put dead letters back where they came from",
        description="Puts the bytes of each letter back to its topic and partition, with its headers, attempts "
        "counted from 1 and a header `replayed`. Each is put back once: its mark on dead.letters is written in the "
        "same transaction, and a second replay, also one at the same time, finds it. Mend the cause first. Every "
        "stage that reads the topic sees the message; those that had no trouble with it know it by its ids. A message "
        "that was too large for a letter stays where it is.",
        examples=[
            "dead-letters replay --dry-run",
            "dead-letters replay --stage demo.verifier --error VerifierError --since 2h",
        ],
    )
    parser.add_argument("--stage", metavar="NAME", default="", help="only letters of this stage, as list prints it")
    parser.add_argument("--error", metavar="TYPE", default="", help="only letters with this error")
    since = "only letters younger than this: 90s, 30m, 2h, 7d"
    parser.add_argument("--since", type=duration, metavar="AGE", help=since)
    parser.add_argument("--dry-run", action="store_true", help="print what would be put back")
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


def show(args: argparse.Namespace) -> int:
    import anyio

    anyio.run(_show, args, where(args))
    return 0


async def _show(args: argparse.Namespace, place: Where) -> None:
    from kat_stream.cli.dead_letters_text import told
    from kat_stream.errors import ConfigError
    from kat_stream.log.dead_letters import collect

    async with place.source() as source:
        found = [letter for letter in await collect(source.messages(("dead.letters",))) if letter.number == args.id]
    if not found:
        raise ConfigError(f"no dead letter {args.id}; see: kat-stream dead-letters list")
    print(told(found[0]))


def replay(args: argparse.Namespace) -> int:
    import anyio

    anyio.run(_replay, args)
    return 0


async def _replay(args: argparse.Namespace) -> None:
    from kat_stream.cli.dead_letters_text import summary, wanted
    from kat_stream.log import dead_letters

    log = broker_log(args, values=True)
    await log.start()
    try:
        count = 0
        chosen = wanted(args.stage, args.error, args.since)
        todo = dead_letters.pending if args.dry_run else dead_letters.replay
        async for letter in todo(log, chosen):
            print(summary(letter) + (f"; stays: {letter.stays}" if letter.stays else ""))
            count += not letter.stays
        print(f"{count} {'would be ' if args.dry_run else ''}put back")
    finally:
        await log.close()
