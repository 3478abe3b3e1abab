"""`kat-stream topics`: the catalogue, and whether a broker has it."""

from __future__ import annotations

import argparse
from typing import Any

from kat_stream.cli.common import add_command, add_group, add_log_options, broker_log, table

DAY_MS = 24 * 3600 * 1000


def register(subparsers: Any) -> None:
    group = add_group(
        subparsers,
        "topics",
        help="the topics: list them, create them, compare them with a broker's",
        description="Topics are the only interface between the parts of the system. Their names, records, keys and "
        "partitions are the catalogue in topics/catalogue.py.",
    )
    add_command(
        group,
        "list",
        list_,
        help="the catalogue",
        description="Prints each topic with its record, key, number of partitions and retention, in the order of "
        "the flow. Records of one group share a partition, so that one consumer sees the whole group.",
        examples=["topics list"],
    )
    apply_parser = add_command(
        group,
        "apply",
        apply,
        help="create the topics that a broker lacks",
        description="Creates missing topics. One that exists with another number of partitions is an error: records "
        "of a group would not meet any more. Doing it twice changes nothing.",
        examples=["topics apply --log kafka:localhost:9092", "topics apply --config my.toml"],
    )
    diff_parser = add_command(
        group,
        "diff",
        diff,
        help="what a broker has that differs from the catalogue",
        description="Prints one line for each topic that is missing (-) or has another number of partitions (!). "
        "The exit code is 1 if there is any.",
        examples=["topics diff --log kafka:localhost:9092"],
    )
    add_log_options(apply_parser)
    add_log_options(diff_parser)


def list_(args: argparse.Namespace) -> int:
    from topics import CATALOGUE, header_of

    rows = [("TOPIC", "RECORD", "KEY", "PARTITIONS", "KEPT", "ABOUT")]
    for topic in CATALOGUE:
        kept = "newest of a key" if topic.cleanup == "compact" else f"{topic.retention_ms // DAY_MS} days"
        rows.append((topic.name, header_of(topic.record), topic.key or "-", str(topic.partitions), kept, topic.about))
    print(table(rows))
    return 0


def apply(args: argparse.Namespace) -> int:
    import anyio

    created = anyio.run(_apply, args)
    for name in created:
        print(f"created {name}")
    if not created:
        print("nothing to do: all topics are there")
    return 0


def diff(args: argparse.Namespace) -> int:
    import anyio

    lines = anyio.run(_diff, args)
    for line in lines:
        print(line)
    if not lines:
        print("no difference")
    return 1 if lines else 0


async def _apply(args: argparse.Namespace) -> list[str]:
    from topics import CATALOGUE

    log = broker_log(args)
    await log.start()
    try:
        return await log.apply_topics(CATALOGUE)
    finally:
        await log.close()


async def _diff(args: argparse.Namespace) -> list[str]:
    from topics import CATALOGUE

    log = broker_log(args)
    await log.start()
    try:
        there = await log.topics()
    finally:
        await log.close()
    lines = []
    for topic in CATALOGUE:
        count = there.get(topic.name)
        if count is None:
            lines.append(f"- {topic.name}: missing")
        elif count != topic.partitions:
            lines.append(f"! {topic.name}: {count} partitions, the catalogue says {topic.partitions}")
    return lines
