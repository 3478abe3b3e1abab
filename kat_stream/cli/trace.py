"""`kat-stream trace ID`: the life of one rollout across topics, as a story, or where the records of a group lie."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from kat_stream.cli.common import Where, add_command, add_log_options, add_run_option, where

if TYPE_CHECKING:
    from pathlib import Path

    from kat_stream.observe.group import GroupTrace
    from kat_stream.observe.trace import Decode, RolloutTrace


def register(subparsers: Any) -> None:
    parser = add_command(
        subparsers,
        "trace",
        trace,
        help="the life of one rollout, or of a group, across all topics",
        description="Tells what happened to one rollout: what was asked, each turn of the agent with its tokens and "
        "policy versions, how it ended, its patch, its grading with the evidence, how it was packed, "
        "and the optimizer step that it is part of, or why it is part of none. Lines with > are what "
        "the agent said, lines with < what it was told, decoded from the recorded tokens. Of a group it prints the "
        "topic, partition and offset of each record, and what is missing.",
        examples=[
            "trace 20260101-120000-s0-t000012-3",
            "trace 20260101-120000-s0-t000012-3 --tokens       every token id with its log-prob",
            "trace 20260101-120000-s0-t000012                  the group: positions and gaps",
            "ledger latest --names failed                      where to find ids",
        ],
    )
    parser.add_argument("id", metavar="ID", help="of a rollout or a group")
    parser.add_argument("--tokens", action="store_true", help="show token ids and log-probs")
    add_run_option(parser)
    add_log_options(parser)


def trace(args: argparse.Namespace) -> int:
    import anyio

    from kat_stream.errors import ConfigError, DataError

    if not args.id:
        raise ConfigError("ID is empty: it is the id of a rollout or of a group")
    place = where(args)
    story = anyio.run(_collect, args.id, place)
    if story.known:
        lines = story.lines(tokens=args.tokens, decode=_decoder(place.run_dir))
    else:
        group = anyio.run(_collect_group, args.id, place)
        if not group.known:
            of = f" in run {place.run_dir.name}" if place.run_dir else ""
            hint = "`kat-stream ledger RUN --names STATE` prints ids"
            raise DataError(f"no record speaks of a rollout or a group `{args.id}`{of}; {hint}")
        lines = group.lines()
    for line in lines:
        print(line)
    return 0


async def _collect(rollout_id: str, place: Where) -> RolloutTrace:
    """Reads the group's one partition and the optimizer steps, from the archive by its columns."""
    from kat_stream.curriculum import group_of
    from kat_stream.observe.sources import read_records
    from kat_stream.observe.trace import TOLD_TOPICS, RolloutTrace

    story = RolloutTrace(rollout_id)
    async with place.source() as source:
        async for record, timestamp_ms in read_records(source, TOLD_TOPICS, group_id=group_of(rollout_id)):
            story.apply(record, timestamp_ms)
    return story


async def _collect_group(group_id: str, place: Where) -> GroupTrace:
    from kat_stream.observe.group import GroupTrace
    from kat_stream.observe.sources import Unreadable
    from kat_stream.observe.trace import TOLD_TOPICS

    found, passed_over = GroupTrace(group_id), Unreadable()
    async with place.source() as source:
        async for delivered in source.messages(TOLD_TOPICS, group_id):
            record = passed_over.read(delivered)
            if record is not None and source.run in ("", record.run):
                found.apply(delivered, record)
    return found


def _decoder(run_dir: Path | None) -> Decode | None:
    """Token ids to text by the run's own tokenizer; None where it or the `tokenizers` package is not to be had."""
    from kat_stream.errors import ConfigError
    from kat_stream.policy import model_dir
    from kat_stream.runs import load_run

    if run_dir is None:
        return None
    try:
        from tokenizers import Tokenizer

        path = model_dir(load_run(run_dir).policy.model) / "tokenizer.json"
    except (ModuleNotFoundError, ConfigError):
        return None
    if not path.is_file():
        return None
    tokenizer = Tokenizer.from_file(str(path))
    return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=False)
