"""`kat-stream sandboxes|losses|verifiers|formats list`: what is registered, one line each.

Invariant: listing imports nothing that is registered, so that a broken or heavy package does not break the list.
"""

from __future__ import annotations

import ast
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kat_stream.cli.common import add_command, add_group, table

KINDS = {
    "sandboxes": "where agents and graders run",
    "losses": "what a step of the learner makes smaller",
    "verifiers": "how a finished work tree becomes a score",
    "formats": "how finished rollouts become rows of a data set",
}


def register(subparsers: Any) -> None:
    for kind, about in KINDS.items():
        group = add_group(subparsers, kind, help=about, description=f"{about.capitalize()}.")
        add_list(group, kind)


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
    rows = registered(kind)
    print(table(rows) if rows else f"no {kind} are registered (entry-point group kat_stream.{kind})")
    return 0


def registered(kind: str) -> list[tuple[str, str]]:
    """Names of one kind of plug-in, sorted, and what each is; nothing of theirs is imported."""
    points = sorted(entry_points(group=f"kat_stream.{kind}"), key=lambda point: point.name)
    return [(point.name, _about(point)) for point in points]


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
