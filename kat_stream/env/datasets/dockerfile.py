"""The part of a Dockerfile that is data: what is copied where, the work directory and the environment variables.

Owns the decision whether an image has to be built. Invariant: an instruction that needs a build (RUN, COPY --from, ADD
of a URL or archive, a second stage) is a TaskError that names file, line and instruction; nothing is ever skipped
silently that would change the work tree. The base image of FROM is replaced by the sandbox's own system.
"""

from __future__ import annotations

import json
import posixpath
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kat_stream.env.datasets.base import read_file, read_tree
from kat_stream.errors import TaskError

# They describe the image and leave the work tree as it is; the sandbox has its own user, command and health.
_WITHOUT_EFFECT = frozenset(
    ["USER", "LABEL", "CMD", "ENTRYPOINT", "EXPOSE", "MAINTAINER", "STOPSIGNAL", "HEALTHCHECK", "SHELL"]
)
_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


@dataclass
class Image:
    """What a Dockerfile puts into the work tree; `files` maps an absolute path to (content, permission bits)."""

    workdir: str = "/"
    env: dict[str, str] = field(default_factory=dict)
    files: dict[str, tuple[bytes, int]] = field(default_factory=dict)


def read_dockerfile(path: Path) -> Image:
    """Apply the instructions of a Dockerfile without building it; the build context is its directory."""
    reader = _Reader(path)
    for line, instruction, rest in _instructions(path):
        reader.apply(line, instruction, rest)
    return reader.image


def _instructions(path: Path) -> Iterator[tuple[int, str, str]]:
    """(line number, INSTRUCTION, rest), continuations joined and comments left out."""
    start, parts = 0, []
    for number, raw in enumerate(path.read_text("utf-8", errors="replace").splitlines(), 1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        start = start or number
        parts.append(line.removesuffix("\\").strip())
        if not line.endswith("\\"):
            word, _, rest = " ".join(parts).partition(" ")
            yield start, word.upper(), rest.strip()
            start, parts = 0, []


class _Reader:
    def __init__(self, path: Path) -> None:
        self.image = Image()
        self._path = path
        self._context = path.parent.resolve()
        self._arguments: dict[str, str] = {}
        self._stages = 0
        self._at = ""

    def apply(self, line: int, instruction: str, rest: str) -> None:
        self._at = f"{self._path}:{line}: {instruction}"
        if instruction == "FROM":
            self._from()
        elif instruction in ("COPY", "ADD"):
            self._copy(rest)
        elif instruction == "WORKDIR":
            self.image.workdir = posixpath.normpath(posixpath.join(self.image.workdir, self._expand(rest)))
        elif instruction in ("ENV", "ARG"):
            self._variables(instruction, rest)
        elif instruction not in _WITHOUT_EFFECT:
            raise TaskError(f"{self._at} needs an image build, which this reader does not do")

    def _from(self) -> None:
        self._stages += 1
        if self._stages > 1:
            raise TaskError(f"{self._at}: a second stage needs an image build, which this reader does not do")

    def _variables(self, instruction: str, rest: str) -> None:
        values = self.image.env if instruction == "ENV" else self._arguments
        if instruction == "ENV" and "=" not in rest.split(" ", 1)[0]:
            name, _, value = rest.partition(" ")
            values[name] = self._expand(value.strip())
            return
        for assignment in shlex.split(rest):
            name, _, value = assignment.partition("=")
            values[name] = self._expand(value)

    def _expand(self, text: str) -> str:
        text = text.strip().strip('"')
        known = {**self._arguments, **self.image.env}
        return _VARIABLE.sub(lambda found: known.get(found[1] or found[2], ""), text)

    def _copy(self, rest: str) -> None:
        mode = None
        while rest.startswith("--"):
            flag, _, rest = rest.partition(" ")
            mode, rest = self._flag(flag) or mode, rest.lstrip()
        words = self._words(rest)
        if len(words) < 2:
            raise TaskError(f"{self._at}: needs a source and a destination")
        *sources, destination = (self._expand(word) for word in words)
        target = posixpath.normpath(posixpath.join(self.image.workdir, destination))
        into = destination.endswith(("/", "/.")) or destination == "." or len(sources) > 1
        for source in sources:
            self._place(source, target, into, mode)

    def _words(self, rest: str) -> list[str]:
        if "<<" in rest:
            raise TaskError(f"{self._at}: a here-document is not supported")
        try:
            return [str(word) for word in json.loads(rest)] if rest.startswith("[") else shlex.split(rest)
        except ValueError as error:
            raise TaskError(f"{self._at}: {error}") from error

    def _flag(self, flag: str) -> int | None:
        name, _, value = flag.partition("=")
        if name == "--chmod" and re.fullmatch("[0-7]{3,4}", value):
            return int(value, 8) & 0o777
        if name not in ("--chown", "--link"):
            raise TaskError(f"{self._at}: {flag} needs an image build, which this reader does not do")
        return None

    def _place(self, source: str, target: str, into: bool, mode: int | None) -> None:
        if "://" in source or (self._at.endswith("ADD") and source.endswith(_ARCHIVES)):
            raise TaskError(f"{self._at}: {source}: only plain files of the build context can be copied")
        for path in self._matches(source):
            inside = read_tree(path) if path.is_dir() else {"": read_file(path)}
            base = posixpath.join(target, path.name) if into and path.is_file() else target
            for relative, (content, bits) in inside.items():
                place = posixpath.join(base, relative) if relative else base
                self.image.files[place] = (content, bits if mode is None else mode)

    def _matches(self, source: str) -> list[Path]:
        pattern = posixpath.normpath(source.lstrip("/") or ".")
        found = [self._context] if pattern == "." else sorted(self._context.glob(pattern))
        if not found:
            raise TaskError(f"{self._at}: {source} is not in {self._context}")
        for path in found:
            if not path.resolve().is_relative_to(self._context):
                raise TaskError(f"{self._at}: {source} leaves {self._context}")
        return found
