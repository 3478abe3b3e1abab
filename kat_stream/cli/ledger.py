"""`kat-stream ledger RUN`: what became of every rollout that was asked for."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from kat_stream.cli.common import Where, add_command, add_log_options, add_run_argument, table, where

if TYPE_CHECKING:
    from kat_stream.observe.ledger import Ledger, Summary

SETTLE_S = 5.0
"""How long the account of a live run may need until its topics agree."""


def register(subparsers: Any) -> None:
    parser = add_command(
        subparsers,
        "ledger",
        ledger,
        help="the exact account of a run's rollouts",
        description="Recomputes from the records: requested = trained + filtered + stale + failed + cancelled + "
        "evaluated + in flight. Each rollout is counted once, whatever was retried or repeated. A "
        "failure of our own side is `failed`, never reward 0. The topic ledger and the stages' own records are two "
        "accounts, which must agree; where a rollout was trained twice or was never asked for, its id is printed. The "
        "exit code is 1 if the account does not close. It reads the archive, then the log from where the archive ends.",
        examples=[
            "ledger latest",
            "ledger latest --names failed             the rollouts behind a number",
            "ledger latest --names failed:SandboxDied",
            "ledger runs/mine --json",
        ],
    )
    add_run_argument(parser)
    names = "print the ids of these rollouts, one a line"
    parser.add_argument("--names", metavar="STATE[:REASON]", default="", help=names)
    parser.add_argument("--json", action="store_true", help="the account as JSON")
    add_log_options(parser)


def ledger(args: argparse.Namespace) -> int:
    import anyio

    account, where_from = anyio.run(_collect, where(args))
    if args.names:
        state, _, reason = args.names.partition(":")
        found = account.rollouts(_state(state), reason)
        for rollout_id in found:
            print(rollout_id)
        if not found:
            print(f"no rollout of {where_from} is {args.names}", file=sys.stderr)
        return 0
    problems = account.check()
    said = account.second_account()
    print(
        _as_json(account.summary(), problems, said)
        if args.json
        else _as_text(account.summary(), problems, said, where_from)
    )
    return 1 if problems else 0


async def _collect(place: Where) -> tuple[Ledger, str]:
    """A live run is read again where it does not close: what disagrees for a moment only is a record on its way."""
    import anyio

    from kat_stream.observe.sources import LogSource, read_ledger

    async with place.source() as source:
        account = await read_ledger(source)
        give_up = anyio.current_time() + SETTLE_S
        while isinstance(source, LogSource) and account.check() and anyio.current_time() < give_up:
            await anyio.sleep(1.0)
            account = await read_ledger(source)
        return account, f"run {source.run}, from {source.where}"


def _state(word: str) -> str:
    from kat_stream.errors import ConfigError
    from kat_stream.observe.ledger import TERMINAL

    state = word.replace("-", " ").replace("_", " ")
    if state not in (*TERMINAL, "in flight"):
        raise ConfigError(f"--names {word}: no such state; there are: {', '.join(TERMINAL)}, in-flight")
    return state


def _as_text(summary: Summary, problems: list[str], said: dict[str, int], where_from: str) -> str:
    rows = [("requested", str(summary.requested))]
    for state, value in _parts(summary):
        rows.append((f"  {state}", str(value if isinstance(value, int) else sum(value.values()))))
        if isinstance(value, dict):
            rows += [(f"    {reason or '(no reason)'}", str(count)) for reason, count in value.items()]
    width = max(len(count) for _, count in rows)
    lines = [where_from, table([(name, count.rjust(width)) for name, count in rows])]
    if said:
        lines.append(f"the topic ledger says: {', '.join(f'{state} {count}' for state, count in said.items())}")
    if problems:
        return "\n".join([*lines, "the account does not close:", *(f"  {problem}" for problem in problems)])
    return "\n".join([*lines, f"the account closes: {summary.requested} = {summary.accounted}"])


def _parts(summary: Summary) -> list[tuple[str, int | dict[str, int]]]:
    return [
        ("trained", summary.trained),
        ("filtered", summary.filtered),
        ("stale", summary.stale),
        ("failed", summary.failed),
        ("cancelled", summary.cancelled),
        ("evaluated", summary.evaluated),
        ("in flight", summary.in_flight),
    ]


def _as_json(summary: Summary, problems: list[str], said: dict[str, int]) -> str:
    import json
    from dataclasses import asdict

    return json.dumps({**asdict(summary), "topic_ledger": said, "closes": not problems, "problems": problems})
