"""The published weights of a run: which of them stay.

    DIRECTORY/LINEAGE.NUMBER/     a policy version (publication.py)

Invariant: of what lies there only versions and what was left half-written are removed, and by the lineage that owns
the run alone. The newest published version stays until its followers are there: an engine that starts loads it, and one
that is slow may be loading it still.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

VERSION = re.compile(r"\w+\.\d+")
LEFTOVER = re.compile(rf"\.{VERSION.pattern}\..+")
"""As `atomic_directory` names what it writes aside."""


def take_over(directory: Path, newest: str) -> None:
    """What earlier lineages left behind, but the version `newest`, which engines may be told to load until the next."""
    for path in _named(directory, LEFTOVER) + _named(directory, VERSION):
        if path.name != newest:
            shutil.rmtree(path, ignore_errors=True)


def prune(directory: Path, lineage: str, keep: int) -> None:
    """Keep the newest `keep` versions; engines have long loaded what is older. Other lineages are older than this one.

    What cannot be removed now is tried again the next time.
    """

    def age(path: Path) -> tuple[bool, int]:
        name, _, number = path.name.rpartition(".")
        return name == lineage, int(number)

    for path in sorted(_named(directory, VERSION), key=age)[:-keep]:
        shutil.rmtree(path, ignore_errors=True)


def _named(directory: Path, names: re.Pattern[str]) -> list[Path]:
    return [path for path in directory.iterdir() if names.fullmatch(path.name)] if directory.is_dir() else []
