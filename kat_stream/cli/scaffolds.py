"""`kat-stream scaffolds list|install|check`: the agents that work on tasks.

Invariant: listing imports nothing that is registered; a check says of each agent what was wrong, and goes on.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from kat_stream.cli.common import add_command, add_group, table
from kat_stream.cli.plugins import registered

if TYPE_CHECKING:
    from kat_stream.env.scaffolds.check import Checked

KIND = "scaffolds"
ABOUT = "the agents that work on tasks"
_HEADINGS = ("AGENT", "VERSION", "TURNS", "SIDE", "FORKS", "TRAINABLE", "WALL", "MEMORY", "END", "WRONG")
_WRONG_CHARS = 160


def register(subparsers: Any) -> None:
    group = add_group(subparsers, KIND, help=ABOUT, description=f"{ABOUT.capitalize()}.")
    add_command(
        group,
        "list",
        list_,
        help="the known scaffolds",
        description="Prints the agents that are described by a TOML file of ours, and those that installed packages "
        "register through the entry-point group kat_stream.scaffolds. The path of a TOML file of your own is a name, "
        "too; NAME@VERSION is the same agent in another version.",
        examples=["scaffolds list"],
    )
    _add_install(group)
    _add_check(group)


def _add_install(group: Any) -> None:
    parser = add_command(
        group,
        "install",
        install,
        help="install the programs of black-box agents",
        description="Puts the pinned version of each agent's program, with the Node it runs on, once into "
        "~/.cache/kat-stream/agents/NAME/VERSION; sandboxes see it read-only. Versions stand side by side. An agent "
        "that runs in the worker needs none. Where one cannot be installed the others are, and the exit code is 2.",
        examples=["scaffolds install mini-swe-agent", "scaffolds install codex codex@0.168.0", "scaffolds install all"],
    )
    parser.add_argument("names", metavar="NAME", nargs="+", help="see: kat-stream scaffolds list; or `all`")


def _add_check(group: Any) -> None:
    parser = add_command(
        group,
        "check",
        check,
        help="run agents in a sandbox without a network against a scripted policy",
        description="Each agent does one small task through the real gateway. Proved for each: the file is right, the "
        "prompt ids in the records are those that the engine saw, and each sampled token is trained exactly once or "
        "belongs to a side request or an aborted call. TRAINABLE is the share of sampled tokens that are trained, "
        "FORKS their causes, MEMORY the most that the whole sandbox held. The exit code is 1 if anything was wrong.",
        examples=["scaffolds check mini-swe-agent codex", "scaffolds check all"],
    )
    parser.add_argument("names", metavar="NAME", nargs="+", help="see: kat-stream scaffolds list; or `all` installed")
    parser.add_argument("--logs", action="store_true", help="print the end of each agent's own output")


def list_(args: argparse.Namespace) -> int:
    from kat_stream.env.scaffolds.description import read_description
    from kat_stream.env.scaffolds.registry import described

    rows = [(name, read_description(path).about) for name, path in described().items()]
    print(table(sorted([*rows, *registered(KIND)])))
    return 0


def install(args: argparse.Namespace) -> int:
    from kat_stream.env.scaffolds import get_scaffold
    from kat_stream.env.scaffolds.blackbox import BlackBox
    from kat_stream.env.scaffolds.registry import described
    from kat_stream.errors import ConfigError

    lacking = []
    for name in described() if args.names == ["all"] else args.names:
        try:
            scaffold = get_scaffold(name)
            what = scaffold.install() if isinstance(scaffold, BlackBox) else "runs in the worker; nothing to install"
            print(f"{name}: {what}", flush=True)
        except ConfigError as error:  # the others do not depend on it
            lacking.append(str(error))
    if lacking:
        raise ConfigError("\n".join(lacking))
    return 0


def check(args: argparse.Namespace) -> int:
    import anyio

    from kat_stream.env.scaffolds.check import checkable
    from kat_stream.env.scaffolds.registry import installed_agents

    names = installed_agents() if args.names == ["all"] else args.names
    for name in names:
        checkable(name)
    checked = anyio.run(_check, names, args.logs)
    print(table([_HEADINGS, *map(_row, checked)]))
    return 1 if any(one.wrong for one in checked) or not checked else 0


async def _check(names: list[str], logs: bool) -> list[Checked]:
    from kat_stream.env.sandboxes.bwrap import BwrapBackend
    from kat_stream.env.scaffolds.check import check

    sandboxes, out = BwrapBackend(), []
    try:
        for name in names:
            out.append(await check(name, sandboxes))
            if logs:
                print(f"--- {name}\n{out[-1].trajectory.log}", flush=True)
    finally:
        await sandboxes.close()
    return out


def _row(one: Checked) -> tuple[str, ...]:
    turns = one.trajectory.turns
    side = sum(bool(turn.side) for turn in turns)
    forks = ", ".join(f"{count} {cause}" for cause, count in sorted(one.forks.items())) or "-"
    return (
        one.name,
        one.version,
        str(len(turns) - side),
        str(side),
        forks,
        f"{one.trainable / one.sampled:.0%}" if one.sampled else "-",
        f"{one.trajectory.seconds:.1f} s",
        f"{one.memory_bytes / 2**20:.0f} MB" if one.memory_bytes else "-",
        one.trajectory.outcome,
        "; ".join(one.wrong)[:_WRONG_CHARS] or "-",
    )
