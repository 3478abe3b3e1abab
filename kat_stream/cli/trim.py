"""`kat-stream topics trim RUN`: remove from a broker what the archive has and nobody will read there again."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kat_stream.cli.common import add_command, add_log_options, add_run_argument, broker_log, table, where

if TYPE_CHECKING:
    from kat_stream.observe.ledger import Ledger
    from kat_stream.retention import Trim


def register(group: Any) -> None:
    """As a command of `kat-stream topics`."""
    parser = add_command(
        group,
        "trim",
        trim,
        help="remove what is archived and needed by nobody",
        description="Removes the oldest messages of turns, trajectories, scores and batches from the broker, up to the "
        "least of: where the archive ends, the positions in the oldest kept checkpoint, what every consumer group has "
        "committed, and the first turn of a group in flight. Prints what bounds each topic. Runs beside this one (in "
        "the same parent folder) that have a group on the broker bound it too, with their archives, checkpoints and "
        "groups in flight; runs elsewhere are not known here. The account of the run stays exact: it is read from the "
        "archive first.",
        examples=["topics trim latest --dry-run", "topics trim runs/mine"],
    )
    add_run_argument(parser)
    parser.add_argument("--dry-run", action="store_true", help="print what would be removed and stop")
    add_log_options(parser)


def trim(args: argparse.Namespace) -> int:
    import anyio

    trims = anyio.run(_trim, args)
    print(table([("TOPIC", "WOULD REMOVE" if args.dry_run else "REMOVED", "BOUNDED BY"), *_rows(trims)]))
    return 0


async def _trim(args: argparse.Namespace) -> list[Trim]:
    from kat_stream.log.kafka import KafkaLog
    from kat_stream.observe.sources import open_source, read_ledger
    from kat_stream.retention import carry_out, plan

    place, log = where(args), broker_log(args)
    assert place.run_dir is not None and isinstance(log, KafkaLog)  # both have been asked for

    async def account(run_dir: Path) -> Ledger:
        async with open_source(run_dir, place.url, place.security, archive_will_do=False) as source:
            return await read_ledger(source)

    await log.start()
    try:
        trims = await plan(log, place.run_dir, account)
        if not args.dry_run:
            await carry_out(log, trims)
    finally:
        await log.close()
    return trims


def _rows(trims: list[Trim]) -> list[tuple[str, str, str]]:
    rows = []
    for topic in dict.fromkeys(one.bound.place.topic for one in trims):
        ours = [one for one in trims if one.bound.place.topic == topic]
        reasons = Counter(one.bound.why for one in ours)
        why = ", ".join(f"{reason} ({count} of {len(ours)} partitions)" for reason, count in reasons.most_common())
        rows.append((topic, str(sum(one.messages for one in ours)), why))
    return rows
