"""`kat-stream export RUN`: the rollouts of a run as a data set of Parquet."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kat_stream.cli.common import Where, add_command, add_log_options, add_run_argument, count, table, where

if TYPE_CHECKING:
    from kat_stream.env.manager.export import Export, Report

SHOWN = 3
"""Rollouts that cannot be written, named in the report."""


def register(subparsers: Any) -> None:
    parser = add_command(
        subparsers,
        "export",
        export,
        help="the rollouts of a run as a data set",
        description="Writes what the agents of a run sampled to OUT/train.parquet, which datasets.load_dataset(OUT) "
        "and TRL read as it is, from the run's log and archive. `tree`: each unique token once, as the "
        "learner trains it. `per-turn`, `linear` and `longest-branch`: input_ids and labels. `sft`: OpenAI "
        "messages with tools, whatever dialect the agent spoke. Only trainable turns are learned from. "
        "`kat-stream formats list` shows all formats.",
        examples=[
            "export latest --out data/all                                  token trees",
            "export latest --format sft --where 'score>=1' --out data/sft  good rollouts to imitate",
            "export my-run --format linear --max-tokens 8192 --out data/linear",
            "export my-run --format sft --drop-failed --where 'score>=1 and turns<=20' --out data/short",
        ],
    )
    add_run_argument(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write train.parquet to")
    parser.add_argument("--format", default="tree", metavar="NAME", help="(default: tree)")
    parser.add_argument("--where", dest="conditions", default="", metavar="CONDITIONS", help=_where_help())
    _add_rules(parser)
    add_log_options(parser)


def _where_help() -> str:
    from kat_stream.env.manager.where import FIELDS

    return f"only rollouts for which all hold, joined by `and`; fields: {', '.join(FIELDS)}"


def _add_rules(parser: argparse.ArgumentParser) -> None:
    orders = ("completed", "thread", "branch")
    parser.add_argument("--order", choices=orders, default="completed", help="of turns (default: completed)")
    parser.add_argument("--max-tokens", type=count, metavar="N", help="leave out turns whose path is longer")
    parser.add_argument("--max-turns", type=count, metavar="N", help="leave out what comes behind N turns on a path")
    parser.add_argument(
        "--drop-failed",
        nargs="?",
        const="",
        metavar="REGEX",
        help="leave out turns whose tool call does not parse or whose result has REGEX in it "
        "(default: what the known agents write for a failed command)",
    )


def export(args: argparse.Namespace) -> int:
    import anyio

    place = where(args)
    report = anyio.run(_export, place, _how(args, place), args.out)
    _print(report, args.out)
    return 0 if report.rows else 1


async def _export(place: Where, how: Export, out: Path) -> Report:
    from kat_stream.env.manager.export import export as write

    async with place.source() as source:
        return await write(source, how, out)


def _how(args: argparse.Namespace, place: Where) -> Export:
    from kat_stream.env import plugins
    from kat_stream.env.manager import GROUP, Policy, Rules
    from kat_stream.env.manager.export import Export
    from kat_stream.env.manager.where import parse_where
    from kat_stream.runs import load_run

    rules = Rules(args.order, args.max_tokens, args.max_turns, _pattern(args.drop_failed))
    assert place.run_dir is not None  # RUN has a default
    policy = Policy(load_run(place.run_dir).policy.model)
    return Export(plugins.load(GROUP, args.format), policy, rules, parse_where(args.conditions))


def _pattern(given: str | None) -> re.Pattern[str] | None:
    from kat_stream.env.manager import FAILED
    from kat_stream.errors import ConfigError

    try:
        return None if given is None else re.compile(given or FAILED)
    except re.error as error:
        raise ConfigError(f"--drop-failed: {given!r} is no regular expression: {error}") from error


def _print(report: Report, out: Path) -> None:
    written = (
        f"{report.rows} rows of {report.kept} turns" if report.rows else "not written: no rollout has a row for it"
    )
    print(f"{out}/train.parquet: {written}")
    rows = [(f"rollouts {fate}", str(count)) for fate, count in report.fates.items()]
    rows += [("turns left out as failed", str(report.failed))] * bool(report.failed)
    if rows:
        print(table(rows))
    for line in report.unwritable[:SHOWN]:
        print(f"  {line}")
