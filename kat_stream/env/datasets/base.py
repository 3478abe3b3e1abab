"""What a dataset is: tasks, and for each task the files of its work tree, its hidden tests and its solution.

Owns the protocol, the spec syntax and the reading of directories. Invariant: nothing outside the directory that is
read ever enters a sandbox: a symbolic link or a path that leaves it is a TaskError.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol
from urllib.parse import parse_qsl, unquote, urlencode

from kat_stream.errors import ConfigError, TaskError
from topics import Task

type Files = Mapping[str, tuple[bytes, int]]
"""Relative path -> (content, permission bits)."""

_log = logging.getLogger(__name__)


class Dataset(Protocol):
    """One open dataset. All methods are synchronous: files come from memory or a local disk."""

    name: str

    def scan(self) -> Iterator[Task | TaskError]:
        """Every task in order; a broken one as the error that names its file and the reason."""
        ...

    def tasks(self, limit: int | None = None) -> list[Task]:
        """The usable tasks in order, at most `limit`; broken ones are logged. `run` is empty: the producer sets it."""
        ...

    def files(self, task: Task) -> Files:
        """The work tree, relative to `task.environment.workdir`."""
        ...

    def tests(self, task: Task) -> Files:
        """What only the grader may see."""
        ...

    def solution(self, task: Task) -> Files:
        """`solve.sh` and what it needs; empty if the task has no reference solution."""
        ...


@dataclass(frozen=True)
class Spec:
    """A parsed dataset spec `scheme:location?option=value&...`, `%3F` being a `?` of the location, as in every URL."""

    text: str
    scheme: str
    location: str
    options: Mapping[str, str]

    @classmethod
    def parse(cls, text: str) -> Spec:
        """ConfigError if there is no scheme or the options are not `a=b&c=d`."""
        scheme, colon, rest = text.partition(":")
        if not colon or not scheme:
            raise ConfigError(f"dataset {text!r}: expected scheme:location?option=value, such as harbor:PATH")
        location, _, query = rest.partition("?")
        try:
            options = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
        except ValueError as error:
            raise ConfigError(f"dataset {text!r}: options: {error}") from error
        return cls(text, scheme, unquote(location, errors="surrogateescape"), options)

    def with_options(self, **options: str) -> str:
        """The spec's text with these options set."""
        merged = {**self.options, **options}
        return f"{self.text.partition('?')[0]}?{urlencode(merged)}"

    def check_options(self, known: Iterable[str]) -> None:
        """ConfigError for an option that this kind of dataset does not have."""
        known = sorted(known)
        for option in self.options:
            if option not in known:
                listed = ", ".join(known) or "none"
                raise ConfigError(f"dataset {self.text!r}: unknown option {option!r} (known: {listed})")

    def number(self, option: str, default: int) -> int:
        """An option that is a non-negative integer; ConfigError if it is not."""
        text = self.options.get(option, str(default))
        if not text.isdecimal():
            raise ConfigError(f"dataset {self.text!r}: {option}={text!r} is not a number")
        return int(text)

    def directory(self) -> Path:
        """The location as an existing directory, absolute; ConfigError if there is none."""
        path = Path(self.location).expanduser().resolve()
        if not path.is_dir():
            raise ConfigError(f"dataset {self.text!r}: {path} is not a directory")
        return path

    def reference(self, task_id: str) -> str:
        """What a Task record says about where its files are."""
        return f"{self.text}#{task_id}"


def usable(entries: Iterable[Task | TaskError], limit: int | None) -> list[Task]:
    """The tasks among scanned entries; the errors go to the log."""
    return list(islice(_logged(entries), limit))


def _logged(entries: Iterable[Task | TaskError]) -> Iterator[Task]:
    for entry in entries:
        if isinstance(entry, TaskError):
            _log.warning("task left out: %s", entry)
        else:
            yield entry


def entry(path: Path, read: Callable[[], Task]) -> Task | TaskError:
    """The task at `path`; whatever its files do to a reader is the error of this task, and no end of a scan."""
    try:
        return read()
    except TaskError as error:
        return error
    except (OSError, ValueError, RecursionError) as error:
        return TaskError(f"{path}: {error}")


def read_tree(root: Path, *, without: frozenset[str] = frozenset()) -> dict[str, tuple[bytes, int]]:
    """All regular files below `root`, leaving out top-level names in `without`; TaskError for links and devices.

    Empty where there is no such directory.
    """
    if root.is_symlink():
        raise TaskError(f"{root}: a link, not a directory")
    files: dict[str, tuple[bytes, int]] = {}
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        if relative.parts[0] in without or (path.is_dir() and not path.is_symlink()):
            continue
        files[relative.as_posix()] = read_file(path)
    return files


def read_text(path: Path) -> str:
    """A regular file of UTF-8 text without its byte-order mark, with Unix line ends.

    TaskError if it is missing, cannot be read or holds something else.
    """
    if not os.path.lexists(path):
        raise TaskError(f"{path}: missing")
    try:
        return read_file(path)[0].decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise TaskError(f"{path}: {error}") from error


def read_file(path: Path) -> tuple[bytes, int]:
    """One regular file as (content, permission bits); TaskError if it is a link, a device or cannot be read."""
    if path.is_symlink() or not path.is_file():
        raise TaskError(f"{path}: not a regular file")
    try:
        return path.read_bytes(), path.stat().st_mode & 0o777
    except OSError as error:
        raise TaskError(f"{path}: {error.strerror}") from error
