"""`kat-stream topics`: the catalogue, and whether a broker has it."""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from kat_stream.cli import topics_acl, trim
from kat_stream.cli.common import add_command, add_group, add_log_options, broker_log, log_section, table

if TYPE_CHECKING:
    from kat_stream.log.kafka import KafkaLog
    from kat_stream.log.kafka_topics import Difference

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
        help="create the topics that a broker lacks and set what differs",
        description="Creates missing topics and sets retention, cleanup, message size and min.insync.replicas to the "
        "catalogue's values. Nothing is ever deleted. A topic with another number of partitions is an error and "
        "nothing is changed: records of a group would not meet any more. Choose log.partitions (12) before the first "
        "run: it is the most workers of a stage. Doing it twice changes nothing.",
        examples=[
            "topics apply --log kafka:localhost:9092 --set log.partitions=48",
            "topics apply --config my.toml --dry-run",
        ],
    )
    apply_parser.add_argument("--dry-run", action="store_true", help="print what would be done and stop")
    diff_parser = add_command(
        group,
        "diff",
        diff,
        help="what a broker has that differs from the catalogue",
        description="Prints one line for each thing that differs: a topic is missing (-), `apply` sets it (~), "
        "`apply` cannot change it (!), or the catalogue does not know the topic (?). The exit code is 1 if there is "
        "any of the first three.",
        examples=["topics diff --log kafka:localhost:9092"],
    )
    topics_acl.register(group)
    trim.register(group)
    add_log_options(apply_parser)
    add_log_options(diff_parser)


def list_(args: argparse.Namespace) -> int:
    from topics import CATALOGUE, header_of

    rows = [("TOPIC", "RECORD", "KEY", "PARTITIONS", "KEPT", "ABOUT")]
    for topic in CATALOGUE:
        kept = "newest of a key" if topic.cleanup == "compact" else _kept(topic.retention_ms)
        rows.append((topic.name, header_of(topic.record), topic.key or "-", str(topic.partitions), kept, topic.about))
    print(table(rows))
    return 0


def _kept(retention_ms: int) -> str:
    return "until trimmed" if retention_ms < 0 else f"{retention_ms // DAY_MS} days"


def apply(args: argparse.Namespace) -> int:
    import anyio

    differences = anyio.run(_apply, args)
    for line in done(differences, "would be " if args.dry_run else ""):
        print(line)
    if not differences:
        print("nothing to do: all topics are as in the catalogue")
    return 0


def diff(args: argparse.Namespace) -> int:
    import anyio

    differences = anyio.run(_diff, args)
    for line in [*map(str, differences), *advice(differences)]:
        print(line)
    if not differences:
        print("no difference")
    return 1 if any(difference.what != "unknown" for difference in differences) else 0


async def _apply(args: argparse.Namespace) -> list[Difference]:
    """What differed: what was put right, or would be, and what an operator has to do."""
    from kat_stream.log.kafka_topics import refuse_repartition
    from topics import catalogue

    wanted = catalogue(log_section(args).partitions)
    async with _kafka(args) as log:
        differences = [one for one in await log.compare_topics(wanted) if one.what != "unknown"]
        refuse_repartition(differences)
        if not args.dry_run:
            await log.apply_topics(wanted)
            await log.align_topics(differences)
    return differences


def done(differences: Sequence[Difference], would: str) -> list[str]:
    """A line for each difference that `apply` puts right, or leaves to an operator, and what that one has to do."""
    lines = []
    for difference in differences:
        if difference.what == "missing":
            lines.append(f"{would}created {difference.topic}")
        elif difference.mendable:
            change = f"{difference.what} {difference.there} -> {difference.wanted}"
            lines.append(f"{would}set {difference.topic}: {change}")
        else:
            lines.append(str(difference))
    return lines + advice(differences)


def advice(differences: Sequence[Difference]) -> list[str]:
    """What to do about topics with too few copies, which nothing here can mend; empty if there are none."""
    few = [difference for difference in differences if difference.what == "replicas"]
    if not few:
        return []
    return [
        f"{len(few)} topics have fewer copies than this cluster gives new ones: made while a broker was away, or when "
        "there were fewer. Give them more by Kafka's kafka-reassign-partitions, then `kat-stream topics apply` again "
        "(ops/runbooks/kafka.md, In-sync copies shrink)"
    ]


async def _diff(args: argparse.Namespace) -> list[Difference]:
    from topics import catalogue

    async with _kafka(args) as log:
        return await log.compare_topics(catalogue(log_section(args).partitions))


@asynccontextmanager
async def _kafka(args: argparse.Namespace) -> AsyncIterator[KafkaLog]:
    from kat_stream.log.kafka import KafkaLog

    log = broker_log(args)
    assert isinstance(log, KafkaLog)  # `broker_log` has refused every other
    await log.start()
    try:
        yield log
    finally:
        await log.close()
