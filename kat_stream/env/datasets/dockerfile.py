"""The part of a Dockerfile that is data: what is copied where, the work directory and the environment variables.

Owns the decision whether an image has to be built. Invariant: an instruction that needs a build (RUN, COPY --from, ADD
of a URL or archive, a second stage) or cannot be understood is a TaskError that names file, line and instruction;
nothing is ever skipped silently that would change the work tree. The base image of FROM is replaced by the sandbox's
own system: its variables are those that a sandbox has by itself, and any other that is not set here is a TaskError.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from kat_stream.env.datasets.base import Files, read_file, read_text, read_tree
from kat_stream.env.datasets.dockerignore import Dockerignore
from kat_stream.env.datasets.dockerwords import expand, split
from kat_stream.env.sandboxes.base import ENVIRONMENT, check_variables
from kat_stream.errors import ConfigError, TaskError

# They describe the image and leave the work tree as it is; the sandbox has its own user, command and health.
_WITHOUT_EFFECT = frozenset(
    ["USER", "LABEL", "CMD", "ENTRYPOINT", "EXPOSE", "MAINTAINER", "STOPSIGNAL", "HEALTHCHECK", "SHELL"]
)


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
    files = reader.image.files
    for place in files:
        for above in PurePosixPath(place).parents:
            if str(above) in files:
                raise TaskError(f"{path}: {above} is copied as a file and, for {place}, as a directory")
    return reader.image


def _instructions(path: Path) -> Iterator[tuple[int, str, str]]:
    """(line number, INSTRUCTION, rest), continuations joined and comments left out."""
    start, parts = 0, []
    for number, raw in enumerate(read_text(path).split("\n"), 1):
        line = raw.rstrip()
        if not line or line.lstrip().startswith("#"):
            continue
        start = start or number
        parts.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            yield start, *_words_of(parts)
            start, parts = 0, []
    if parts:  # the file ends in the middle of a line, which is its end
        yield start, *_words_of(parts)


def _words_of(parts: list[str]) -> tuple[str, str]:
    word, _, rest = "".join(parts).strip().partition(" ")
    return word.upper(), rest.strip()


def _is_archive(path: Path) -> bool:
    """Whether ADD would unpack it, which it sees from the content, whatever the name."""
    return path.is_file() and tarfile.is_tarfile(path)


class _Reader:
    def __init__(self, path: Path) -> None:
        self.image = Image()
        self._path = path
        self._context = path.parent.resolve()
        self._ignore = Dockerignore(path)
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
            self.image.workdir = self._absolute(self._expand(rest))
        elif instruction in ("ENV", "ARG"):
            self._variables(instruction, rest)
        elif instruction not in _WITHOUT_EFFECT:
            raise TaskError(f"{self._at} needs an image build, which this reader does not do")

    def _from(self) -> None:
        self._stages += 1
        if self._stages > 1:
            raise TaskError(f"{self._at}: a second stage needs an image build, which this reader does not do")

    def _variables(self, instruction: str, rest: str) -> None:
        """As in Docker, all assignments of one instruction see the variables as they were before it."""
        values = self._assignments(rest) if instruction == "ENV" else self._defaults(rest)
        try:
            check_variables(values)
        except ConfigError as error:
            raise TaskError(f"{self._at}: {error}") from error
        (self.image.env if instruction == "ENV" else self._arguments).update(values)

    def _assignments(self, rest: str) -> dict[str, str]:
        words = split(rest)
        if words and "=" not in words[0]:
            name, *value = rest.split(maxsplit=1)
            words = [f"{name}={value[0]}"] if value else []
        pairs = [word.partition("=") for word in words]
        if not words or not all(mark for _, mark, _ in pairs):
            raise TaskError(f"{self._at}: {rest!r} is not name=value")
        return {self._expand(name): self._expand(value) for name, _, value in pairs}

    def _defaults(self, rest: str) -> dict[str, str]:
        """Nobody gives arguments to a build that does not take place: one without a default keeps an earlier one."""
        pairs = [word.partition("=") for word in split(rest)]
        return {name: self._expand(value) if mark else self._arguments.get(name, "") for name, mark, value in pairs}

    def _expand(self, text: str) -> str:
        try:
            value = expand(text, {**ENVIRONMENT, **self._arguments, **self.image.env})
        except ValueError as error:
            raise TaskError(f"{self._at}: {error}") from error
        if "\0" in value:
            raise TaskError(f"{self._at}: {value!r} holds a NUL byte")
        return value

    def _copy(self, rest: str) -> None:
        mode = None
        while rest.startswith("--"):
            flag, _, rest = rest.partition(" ")
            mode, rest = self._flag(flag) or mode, rest.lstrip()
        words = self._words(rest)
        if len(words) < 2:
            raise TaskError(f"{self._at}: needs a source and a destination")
        *sources, destination = (self._expand(word) for word in words)
        target = self._absolute(destination)
        into = destination.endswith(("/", "/.")) or len(sources) > 1 or self._is_directory(target)
        for source in sources:
            self._place(source, target, into, mode)

    def _absolute(self, path: str) -> str:
        # Two slashes at the beginning mean something to POSIX, and nothing here.
        return "/" + posixpath.normpath(posixpath.join(self.image.workdir, path)).lstrip("/")

    def _is_directory(self, path: str) -> bool:
        """Whether an earlier instruction made it one."""
        return any(place.startswith(f"{path}/") for place in (f"{self.image.workdir}/", *self.image.files))

    def _words(self, rest: str) -> list[str]:
        if "<<" in rest:
            raise TaskError(f"{self._at}: a here-document is not supported")
        if not rest.startswith("["):
            return split(rest)
        try:
            words = json.loads(rest)
        except (ValueError, RecursionError) as error:
            raise TaskError(f"{self._at}: {error}") from error
        if not all(isinstance(word, str) for word in words):
            raise TaskError(f"{self._at}: {rest} is not a list of strings")
        return list(words)

    def _flag(self, flag: str) -> int | None:
        name, _, value = flag.partition("=")
        if name == "--chmod" and re.fullmatch("[0-7]{3,4}", value):
            return int(value, 8) & 0o777
        if name not in ("--chown", "--link"):
            raise TaskError(f"{self._at}: {flag} needs an image build, which this reader does not do")
        return None

    def _place(self, source: str, target: str, into: bool, mode: int | None) -> None:
        found = self._found(source) if "://" not in source else {}
        if not found or (self._at.endswith("ADD") and any(map(_is_archive, found))):
            raise TaskError(f"{self._at}: {source}: only plain files of the build context can be copied")
        for path, inside in found.items():
            base = posixpath.join(target, path.name) if into and path.is_file() else target
            for relative, (content, bits) in inside.items():
                place = posixpath.join(base, relative) if relative else base
                self.image.files[place] = (content, bits if mode is None else mode)

    def _found(self, source: str) -> dict[Path, Files]:
        """What a source of COPY names, each with the files at or below it by their names relative to it."""
        found = {path: self._inside(path) for path in self._matches(source)}
        found = {path: inside for path, inside in found.items() if inside or not self._left_out(path)}
        if not found:
            raise TaskError(f"{self._at}: {source} is not in {self._context}, or .dockerignore leaves it out")
        return found

    def _matches(self, source: str) -> list[Path]:
        pattern = posixpath.normpath(source.lstrip("/") or ".")
        try:
            found = [self._context] if pattern == "." else sorted(self._context.glob(pattern))
        except ValueError as error:
            raise TaskError(f"{self._at}: {source}: {error}") from error
        for path in found:
            if not path.resolve().is_relative_to(self._context):
                raise TaskError(f"{self._at}: {source} leaves {self._context}")
        return found

    def _inside(self, path: Path) -> Files:
        inside = read_tree(path) if path.is_dir() else {"": read_file(path)}
        return {name: file for name, file in inside.items() if not self._left_out(path / name)}

    def _left_out(self, path: Path) -> bool:
        return self._ignore.leaves_out(os.path.relpath(path, self._context))
