"""Names of sandboxes, made so that a later process can tell whether their owner still lives.

Owns the form `<pid>-<start time>-<n>`. Invariant: a name is never given twice on one boot, since a process id
together with its start time is unique.
"""

from __future__ import annotations

import itertools
import os
import re
from pathlib import Path

_NAME = re.compile(r"(\d+)-(\d+)-\d+")
_numbers = itertools.count()


def new_name() -> str:
    """A fresh name owned by this process."""
    pid = os.getpid()
    return f"{pid}-{_start_time(pid)}-{next(_numbers)}"


def is_orphan(name: str) -> bool:
    """Whether `name` has the form and its owner is gone."""
    match = _NAME.fullmatch(name)
    return match is not None and _start_time(int(match[1])) != int(match[2])


def _start_time(pid: int) -> int:
    """Clock ticks since boot at which the process started; 0 if there is none. Source: proc(5), field 22."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(text.rpartition(")")[2].split()[19])
