"""`kat-stream lag`: how far each consumer group is behind."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from kat_stream.cli.common import add_command, add_log_options, add_run_option, broker_log, table

if TYPE_CHECKING:
    from kat_stream.log.lag import Lag


def register(subparsers: Any) -> None:
    parser = add_command(
        subparsers,
        "lag",
        lag,
        help="how far each group is behind, in messages and seconds",
        description="Prints for each consumer group and topic how many messages are not finished yet, and how "
        "old the oldest of them is. Work that is done beyond a slow message is not lag. Reading it "
        "disturbs nobody. A run on the in-memory log shows its lag in its own progress view.",
        examples=["lag", "lag --log kafka:localhost:9092", "lag --json | jq '.[] | select(.messages > 100)'"],
    )
    parser.add_argument("--json", action="store_true", help="a list of {group, topic, messages, seconds}")
    add_run_option(parser)
    add_log_options(parser)


def lag(args: argparse.Namespace) -> int:
    import json

    import anyio

    found = anyio.run(_lag, args)
    if args.json:
        rows = [{"group": x.group, "topic": x.topic, "messages": x.messages, "seconds": x.seconds} for x in found]
        print(json.dumps(rows))
        return 0
    ages = [(x, "-" if x.seconds is None else f"{x.seconds:.1f}") for x in found]
    lines = [(x.group, x.topic, str(x.messages), age) for x, age in ages]
    print(table([("GROUP", "TOPIC", "MESSAGES", "SECONDS"), *lines]) if lines else "no consumer groups")
    return 0


async def _lag(args: argparse.Namespace) -> list[Lag]:
    from kat_stream.log.lag import lags

    log = broker_log(args)
    await log.start()
    try:
        return await lags(log, ages=True)
    finally:
        await log.close()
