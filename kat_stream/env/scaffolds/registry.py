"""Finds a scaffold by its name: a TOML file of ours, a TOML file of yours, or a class of any installed package.

Owns the order of those. Invariant: an agent that is data needs its TOML file and nothing else; NAME@VERSION is the same
agent in another version, beside it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from kat_stream.env.plugins import load, names
from kat_stream.env.scaffolds.base import GROUP, Scaffold
from kat_stream.env.scaffolds.blackbox import BlackBox
from kat_stream.env.scaffolds.description import lock_of, read_description
from kat_stream.errors import ConfigError

DIRECTORY = Path(__file__).with_name("agents")
_SUFFIX = ".toml"


def described() -> dict[str, Path]:
    """Name -> TOML file of the black boxes that come with the package, sorted."""
    return {path.stem: path for path in sorted(DIRECTORY.glob(f"*{_SUFFIX}"))}


def installed_agents() -> list[str]:
    """Those of `described` that are installed on this machine."""
    return [name for name in described() if _is_installed(name)]


def scaffold_names() -> list[str]:
    """Every name that `get_scaffold` knows, sorted."""
    return sorted({*described(), *names(GROUP)})


def check_scaffolds(names: Iterable[str]) -> None:
    """Whether there are scaffolds of these names, before anything runs under them; ConfigError if not."""
    for name in names:
        get_scaffold(name)


def get_scaffold(name: str) -> Scaffold:
    """A new instance of the scaffold `name`, `name@version` or of a TOML file's path; ConfigError if there is none."""
    bare, _, version = name.partition("@")
    path = Path(name) if name.endswith(_SUFFIX) else described().get(bare)
    if path is not None:
        description = read_description(path, "" if name.endswith(_SUFFIX) else version)
        return BlackBox(description, lock_of(path, description))
    scaffold: Scaffold = load(GROUP, name, also=tuple(described()))()
    return scaffold


def _is_installed(name: str) -> bool:
    try:
        get_scaffold(name).needs()
    except ConfigError:
        return False
    return True
