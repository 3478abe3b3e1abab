"""`kat-stream scaffolds|sandboxes|losses|verifiers list`: what is registered, one line each; and `scaffolds install`.

Invariant: listing imports nothing that is registered, so that a broken or heavy package does not break the list.
"""

from __future__ import annotations

import argparse
import ast
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kat_stream.cli.common import add_command, add_group, table

KINDS = {
    "scaffolds": "the agents that work on tasks",
    "sandboxes": "where agents and graders run",
    "losses": "what a step of the learner makes smaller",
    "verifiers": "how a finished work tree becomes a score",
}


def register(subparsers: Any) -> None:
    for kind, about in KINDS.items():
        group = add_group(subparsers, kind, help=about, description=f"{about.capitalize()}.")
        add_list(group, kind)
        if kind == "scaffolds":
            _add_install(group)


def _add_install(group: Any) -> None:
    parser = add_command(
        group,
        "install",
        install,
        help="install the program of a black-box agent",
        description="Puts the pinned version of a black-box agent's program once into the cache; sandboxes see it "
        "read-only. An agent that runs in the worker needs none.",
        examples=["scaffolds install mini-swe-agent"],
    )
    parser.add_argument("name", metavar="NAME", help="see: kat-stream scaffolds list")


def install(args: argparse.Namespace) -> int:
    from kat_stream.env.scaffolds import get_scaffold
    from kat_stream.env.scaffolds.blackbox import BlackBox

    scaffold = get_scaffold(args.name)
    if not isinstance(scaffold, BlackBox):
        print(f"{args.name} runs in the worker; nothing to install")
        return 0
    print(f"{args.name}: {scaffold.install()}")
    return 0


def add_list(group: Any, kind: str) -> None:
    """The `list` command of one kind of plug-in."""
    add_command(
        group,
        "list",
        lambda args: list_(kind),
        help=f"the registered {kind}",
        description=f"Prints the {kind} of every installed package that registers some, with what each is.\n"
        f"A package of your own adds one through the entry-point group kat_stream.{kind}.",
        examples=[f"{kind} list"],
    )


def list_(kind: str) -> int:
    points = sorted(entry_points(group=f"kat_stream.{kind}"), key=lambda point: point.name)
    if not points:
        print(f"no {kind} are registered (entry-point group kat_stream.{kind})")
        return 0
    print(table([(point.name, _about(point)) for point in points]))
    return 0


def _about(point: EntryPoint) -> str:
    """The first line of the docstring of the module that defines it."""
    try:
        spec = find_spec(point.module)
    except ModuleNotFoundError:
        spec = None
    if spec is None or not spec.origin:
        return f"(missing: {point.module})"
    try:
        docstring = ast.get_docstring(ast.parse(Path(spec.origin).read_text()))
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        return f"(unreadable: {error})"
    return (docstring or "").partition("\n")[0]
