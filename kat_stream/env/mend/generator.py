"""Tasks from templates: numbered, split, with a check that tests the whole result.

Owns MendTask and the split. Invariant: whether a task is held out is a function of its template and solution commands
alone (a hash), so no solution of a held-out task, and none of the name tuples in it, is ever that of a training task.
Single names are shared. The same (split, count, seed) gives the same tasks on every machine.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from kat_stream.env.mend.templates import EXECUTABLE, PLAIN, TEMPLATES, Draft, Draw
from kat_stream.errors import TaskError

Split = Literal["train", "held-out"]
# One solution in four is held out.
_HELD_OUT_OF_256 = 64
_MAX_DRAWS = 2000


@dataclass(frozen=True)
class MendTask:
    """One task: `files` is path -> (content, mode), `check` a POSIX sh body that exits 0 in a mended work tree."""

    task_id: str
    template: str
    split: Split
    instruction: str
    files: dict[str, tuple[bytes, int]]
    solution: tuple[str, ...]
    check: str


def generate(split: Split, count: int, seed: int = 0) -> list[MendTask]:
    """`count` tasks of one split, no two with the same solution, the templates in turn: any prefix is balanced.

    Raises TaskError when a template has fewer different solutions (at least 240 held out and 700 for training).
    """
    rng = random.Random(f"mend {split} {seed}")
    seen: set[tuple[str, ...]] = set()
    return [_unseen(template, split, rng, seen) for template in itertools.islice(itertools.cycle(TEMPLATES), count)]


def stream(split: Split, seed: int = 0) -> Iterator[MendTask]:
    """Tasks of one split without end, the templates in turn; repository and solution may come again after hundreds."""
    rng = random.Random(f"mend stream {split} {seed}")
    for template in itertools.cycle(TEMPLATES):
        yield _draw(template, split, rng)


def split_of(template: str, solution: tuple[str, ...]) -> Split:
    """The part that a solution belongs to, for ever."""
    digest = hashlib.sha256("\n".join((template, *solution)).encode()).digest()
    return "held-out" if digest[0] < _HELD_OUT_OF_256 else "train"


def _unseen(template: str, split: Split, rng: random.Random, seen: set[tuple[str, ...]]) -> MendTask:
    for _ in range(_MAX_DRAWS):
        task = _draw(template, split, rng)
        key = (template, *task.solution)
        if key not in seen:
            seen.add(key)
            return task
    raise TaskError(f"template {template}: no new {split} task in {_MAX_DRAWS} draws; ask for fewer")


def _draw(template: str, split: Split, rng: random.Random) -> MendTask:
    while True:
        draft = TEMPLATES[template](Draw(rng))
        if split_of(template, draft.solution) == split:
            return _task(template, split, draft)


def _task(template: str, split: Split, draft: Draft) -> MendTask:
    files = {path: (text.encode(), _mode(path, draft.before_executable)) for path, text in draft.before.items()}
    files["test.sh"] = (_visible_test(draft).encode(), EXECUTABLE)
    digest = hashlib.sha256(repr((template, draft.instruction, sorted(files.items()))).encode()).hexdigest()
    return MendTask(
        task_id=f"mend-{template}-{digest[:10]}",
        template=template,
        split=split,
        instruction=draft.instruction,
        files=files,
        solution=draft.solution,
        check=_check(draft),
    )


def _mode(path: str, executable: frozenset[str]) -> int:
    return EXECUTABLE if path in executable else PLAIN


def _visible_test(draft: Draft) -> str:
    return f'#!/bin/sh\n{draft.condition} || {{ echo "{draft.complaint}"; exit 1; }}\n'


def _check(draft: Draft) -> str:
    """The visible condition, and each file exactly as it must be (trailing newlines apart)."""
    wanted: dict[str, str | None] = {**draft.before, **draft.after}
    conditions = [draft.condition]
    for path, text in wanted.items():
        conditions += [f"test ! -e {path}"] if text is None else _same(path, text)
    conditions += [f"test -x {path}" for path in sorted(draft.executable | draft.before_executable)]
    return " &&\n".join(conditions) + "\n"


def _same(path: str, text: str) -> list[str]:
    return [f"test -f {path}", f'test "$(cat {path})" = {shlex.quote(text.rstrip(chr(10)))}']
