"""What .dockerignore leaves out of a build context.

Owns Docker's patterns (docs.docker.com/build/concepts/context, ".dockerignore files"). Invariant: the last pattern that
fits a file, or a directory above it, decides; a pattern that cannot be read is a TaskError that names file and pattern.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path, PurePosixPath

from kat_stream.env.datasets.base import read_text
from kat_stream.errors import TaskError

# `**` spans directories, `*` and `?` do not, a class [...] is that of a regular expression.
_PIECES = re.compile(
    r"(?P<all>\*\*/?$)|(?P<deep>\*\*/?)|(?P<star>\*)|(?P<one>\?)|\\(?P<literal>.)|(?P<class>\[[^]]*\]?)|."
)
_MEANINGS = {"all": ".*", "deep": "(?:.*/)?", "star": "[^/]*", "one": "[^/]"}


class Dockerignore:
    """The file that belongs to a Dockerfile; without one nothing is left out."""

    def __init__(self, dockerfile: Path) -> None:
        own = dockerfile.with_name(f"{dockerfile.name}.dockerignore")
        path = own if own.is_file() else dockerfile.with_name(".dockerignore")
        lines = read_text(path).splitlines() if path.is_file() else []
        self._rules = [_rule(path, line.strip()) for line in lines if line.strip() and not line.startswith("#")]

    def leaves_out(self, path: str) -> bool:
        """Whether a path, relative to the build context, is not part of it."""
        places = [path, *(str(above) for above in PurePosixPath(path).parents if above.name)]
        out = False
        for pattern, leaves_out in self._rules:
            if any(pattern.fullmatch(place) for place in places):
                out = leaves_out
        return out


def _rule(path: Path, line: str) -> tuple[re.Pattern[str], bool]:
    """A pattern, and whether it leaves out what fits it or takes it in again."""
    text = posixpath.normpath(line.removeprefix("!").strip()).lstrip("/")
    try:
        return re.compile("".join(map(_meaning, _PIECES.finditer(text))), re.DOTALL), not line.startswith("!")
    except re.error as error:
        raise TaskError(f"{path}: {line}: {error}") from error


def _meaning(piece: re.Match[str]) -> str:
    kind = piece.lastgroup or ""
    if kind == "class":
        return piece[0]
    return _MEANINGS.get(kind) or re.escape(piece["literal"] or piece[0])
