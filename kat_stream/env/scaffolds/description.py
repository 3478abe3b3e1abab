"""A black-box agent as data: what stands in its TOML file, read and checked.

Owns the format. Invariant: an agent is this file and its lock, nothing else; an unknown key, outcome or pattern is a
ConfigError that names the file. docs/scaffolds.md explains each key.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from kat_stream import toml
from kat_stream.errors import ConfigError
from topics.trajectory import Outcome

LOCKS = "locks"
_COMMIT = re.compile("[0-9a-f]{40}")


class Git(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A repository, and those of its directories that the agent needs."""

    url: str
    directories: tuple[str, ...] = (".",)


class Install(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`packages` of PyPI (`kind = "python"`) or npm; {version} is the description's. `node`: the Node it runs on."""

    packages: tuple[str, ...]
    kind: Literal["python", "npm"] = "python"
    node: str = ""
    git: Git | None = None
    """For what no registry has: the version is a commit, which is checked out at {agent}/checkout."""

    def __post_init__(self) -> None:
        if wrong := [package for package in self.packages if self.kind == "npm" and package.rfind("@") < 1]:
            raise ValueError(f"{wrong[0]!r} is not NAME@VERSION")
        if self.git and self.kind != "python":
            raise ValueError("install.git is for Python programs")


class Run(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    command: tuple[str, ...]
    env: dict[str, str] = {}
    files: dict[str, str] = {}
    """Absolute path inside the sandbox -> content; placeholders are filled in."""
    stdin: str = ""


class Needs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The sandbox's limits for the program itself; they come on top of the task's own."""

    memory_mb: int
    pids: int
    disk_mb: int = 0
    writable: tuple[str, ...] = ()
    """Directories that the program wants to write to, beside the work tree, its home and /tmp."""


class Ending(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the program says how it ended: a field of a JSON file, a pattern in its last output, its exit code."""

    file: str = ""
    field: str = ""
    values: dict[str, str] = {}
    log: dict[str, str] = {}
    """Regular expression -> outcome; the first that is found in the end of its output counts."""
    exit: dict[str, str] = {}
    """Exit code -> outcome, where nothing else says it."""


class Step(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One reply of the scripted policy: a text, and a call of the agent's own tool."""

    say: str = ""
    tool: str = ""
    arguments: dict[str, Any] = {}


class Check(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a policy would say to do the check's task with this agent: write `fixed` into answer.txt."""

    steps: tuple[Step, ...] = ()
    own_log: str = ""
    """Files that the agent itself writes about its session: a directory, and a pattern of names at any depth."""
    own_log_query: str = ""
    """Those files are one SQLite database: SQL whose rows hold JSON in their first column."""


class Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A black-box agent as data."""

    name: str
    version: str
    install: Install
    run: Run
    needs: Needs
    outcome: Ending = Ending()
    about: str = ""
    check: Check = Check()

    def packages(self) -> tuple[str, ...]:
        return tuple(package.replace("{version}", self.version) for package in self.install.packages)


def read_description(path: Path, version: str = "") -> Description:
    """Read and check an agent's TOML file; ConfigError names the file and the key. `version` replaces its own."""
    try:
        description = msgspec.convert(toml.read(path), Description)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {error}") from error
    ending = description.outcome
    for key in ("values", "log", "exit"):
        _check_outcomes(path, key, getattr(ending, key).values())
    for pattern in ending.log:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"{path}: outcome.log: {pattern!r}: {error}") from error
    if version:
        description = msgspec.structs.replace(description, version=version)
    if description.install.git and not _COMMIT.fullmatch(description.version):
        raise ConfigError(f"{path}: version {description.version!r} is no commit (40 hex digits); a tag can move")
    return description


def lock_of(path: Path, description: Description) -> Path | None:
    """The file with every package's version and hash, beside the description; None if this version has none."""
    suffix = "json" if description.install.kind == "npm" else "txt"
    lock = path.parent / LOCKS / f"{description.name}-{description.version}.{suffix}"
    return lock if lock.is_file() else None


def _check_outcomes(path: Path, key: str, outcomes: Iterable[str]) -> None:
    for value in outcomes:
        if value not in get_args(Outcome):
            raise ConfigError(f"{path}: outcome.{key}: {value!r} is not one of {', '.join(get_args(Outcome))}")
