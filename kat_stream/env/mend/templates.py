"""The templates: what is broken, how it is said, which commands mend it.

Owns the fifteen kinds of defect. Invariant: a draft's `after` is the complete result that its solution produces, so
that a check made from it fails on anything else, lines that had no reason to change included.
Each command is written without quotes where the shell allows it, and every name is followed by a sign: a policy with a
small vocabulary then sees the same token for the same name everywhere.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from kat_stream.env.mend.words import NAMES

PLAIN = 0o644
EXECUTABLE = 0o755


@dataclass(frozen=True)
class Draft:
    """One broken repository before it is split and numbered; texts are file contents by path."""

    instruction: str
    before: dict[str, str]
    # What differs when mended: new content, or None where the file must be gone.
    after: dict[str, str | None]
    solution: tuple[str, ...]
    # The visible test: a shell condition, and what it says when it fails.
    condition: str
    complaint: str
    executable: frozenset[str] = frozenset()
    before_executable: frozenset[str] = frozenset()


class Draw:
    """Random names, never the same twice in one task."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._names = iter(rng.sample(NAMES, 12))

    def name(self) -> str:
        return next(self._names)

    def number(self, low: int, high: int) -> int:
        return self._rng.randint(low, high)

    def pick(self, *choices: str) -> str:
        return self._rng.choice(choices)

    def shuffled(self, *lines: str) -> list[str]:
        return self._rng.sample(lines, len(lines))


def _lines(lines: list[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def _source(draw: Draw) -> str:
    """A source file that no defect touches."""
    return f"def {draw.name()}():\n    return {draw.number(10, 99)}\n"


def config(draw: Draw) -> Draft:
    file, key, value, other, old, kept = (*(draw.name() for _ in range(6)),)
    path = file + draw.pick(".ini", ".conf", ".env")
    lines = draw.shuffled(f"{key}={old}", f"{other}={kept}")
    return Draft(
        instruction=f"In {path}, set {key}={value}.",
        before={path: _lines(lines)},
        after={path: _lines(lines).replace(f"{key}={old}", f"{key}={value}")},
        solution=(f"sed -i s/{key}=.*/{key}={value}/ {path}",),
        condition=f"grep -qx {key}={value} {path}",
        complaint=f"{path}: {key} is wrong",
    )


def constant(draw: Draw) -> Draft:
    file, key, other = draw.name(), draw.name(), draw.name()
    new, old, kept = (str(n) for n in random.Random(draw.number(0, 1 << 30)).sample(range(10, 100), 3))
    path = file + ".py"
    spec = _lines(draw.shuffled(f"{key}={new}", f"{other}={kept}"))
    body = f"{key}={old}\n{other}={kept}\n"
    return Draft(
        instruction=f"In {path}, set {key}: see SPEC.",
        before={path: body, "SPEC": spec},
        after={path: body.replace(f"{key}={old}", f"{key}={new}")},
        solution=(f"grep {key}= SPEC", f"sed -i s/{key}=.*/{key}={new}/ {path}"),
        condition=f"grep -qx {key}={new} {path}",
        complaint=f"{path}: {key} is not as in SPEC",
    )


def rename_file(draw: Draw) -> Draft:
    old, new = draw.name(), draw.name()
    suffix = draw.pick(".py", ".txt", ".sh")
    body = _source(draw)
    return Draft(
        instruction=f"Rename {old}{suffix} to {new}{suffix}.",
        before={old + suffix: body},
        after={old + suffix: None, new + suffix: body},
        solution=(f"mv {old}{suffix} {new}{suffix}",),
        condition=f"test -f {new}{suffix}",
        complaint=f"{new}{suffix} is missing",
    )


def rename_function(draw: Draw) -> Draft:
    file, old, new = draw.name(), draw.name(), draw.name()
    path = file + ".py"
    body = f"def {old}():\n    return {draw.number(10, 99)}\n\n{old}()\n"
    return Draft(
        instruction=f"In {path}, rename {old}() to {new}().",
        before={path: body},
        after={path: body.replace(old, new)},
        solution=(f"sed -i s/{old}/{new}/ {path}",),
        condition=f"grep -q ^{new} {path}",
        complaint=f"{path}: {new} is not called",
    )


def move_file(draw: Draw) -> Draft:
    file, folder = draw.name(), draw.name()
    path = file + draw.pick(".py", ".txt", ".sh")
    body = _source(draw)
    return Draft(
        instruction=f"Move {path} into {folder}/.",
        before={path: body},
        after={path: None, f"{folder}/{path}": body},
        solution=(f"mkdir {folder}", f"mv {path} {folder}/"),
        condition=f"test -f {folder}/{path}",
        complaint=f"{folder}/{path} is missing",
    )


def off_by_one(draw: Draw) -> Draft:
    path, stop = draw.name() + ".py", draw.number(2, 8)
    body = f"for i in range({stop}):\n    {draw.name()}(i)\n"
    return Draft(
        instruction=f"The loop of {path} stops one short.",
        before={path: body},
        after={path: body.replace(f"({stop})", f"({stop + 1})")},
        solution=(f"cat {path}", f"sed -i s/{stop}/{stop + 1}/ {path}"),
        condition=f"grep -q .{stop + 1}.:$ {path}",
        complaint=f"{path} stops one short",
    )


def missing_import(draw: Draw) -> Draft:
    file, module = draw.name(), draw.name()
    path = file + ".py"
    body = f"{module}.run()\n{module}.stop()\n"
    return Draft(
        instruction=f"An import is missing at the top of {path}.",
        before={path: body, f"{module}.py": f"def run():\n    return {draw.number(10, 99)}\n"},
        after={path: f"import {module}\n{body}"},
        solution=(f"cat {path}", f'sed -i "1i import {module}" {path}'),
        condition=f'grep -qx "import {module}" {path}',
        complaint=f"{path}: {module} is not imported",
    )


def wrong_path(draw: Draw) -> Draft:
    script, data, folder = draw.name(), draw.name(), draw.name()
    path, csv = script + ".sh", data + ".csv"
    body = f"#!/bin/sh\nwc -l data/{csv}\n"
    return Draft(
        instruction=f"{path} looks in data/ for {csv}.",
        before={path: body, f"{folder}/{csv}": f"{draw.name()},{draw.number(10, 99)}\n"},
        after={path: body.replace("data/", f"{folder}/")},
        solution=(f"find . -name {csv}", f"sed -i s,data,{folder}, {path}"),
        condition=f"grep -q {folder}/{csv} {path}",
        complaint=f"{path}: {csv} is not found",
        before_executable=frozenset({path}),
    )


def json_value(draw: Draw) -> Draft:
    file, key, new, old, other, kept = (*(draw.name() for _ in range(6)),)
    path = file + ".json"
    first, second = draw.shuffled(f'"{key}":"{old}"', f'"{other}":"{kept}"')
    body = f"{{\n{first},\n{second}\n}}\n"
    return Draft(
        instruction=f"In {path}, set {key}: {new}.",
        before={path: body},
        after={path: body.replace(f'"{old}"', f'"{new}"')},
        solution=(f"""grep '"{key}"' {path}""", f"sed -i s:{old}:{new}: {path}"),
        condition=f"""grep -q '"{key}":"{new}"' {path}""",
        complaint=f"{path}: {key} is wrong",
    )


def csv_row(draw: Draw) -> Draft:
    file, left, right = draw.name(), draw.name(), draw.name()
    path = file + ".csv"
    body = f"{draw.name()},{draw.name()}\n{draw.name()},{draw.name()}\n"
    return Draft(
        instruction=f"To {path}, add the row {left},{right}.",
        before={path: body},
        after={path: f"{body}{left},{right}\n"},
        solution=(f"echo {left},{right}>>{path}",),
        condition=f"grep -qx {left},{right} {path}",
        complaint=f"{path}: a row is missing",
    )


def permission(draw: Draw) -> Draft:
    path = f"{draw.name()}/{draw.name()}.sh"
    body = f"#!/bin/sh\necho {draw.name()}\n"
    return Draft(
        instruction=f"Make {path} executable.",
        before={path: body},
        after={path: body},
        solution=(f"chmod +x {path}",),
        condition=f"test -x {path}",
        complaint=f"{path} is not executable",
        executable=frozenset({path}),
    )


def ignore_file(draw: Draw) -> Draft:
    folder, file = draw.name(), draw.name()
    kept = f"{draw.name()}.log\n"
    return Draft(
        instruction=f"Git must ignore {folder}/{file}.",
        before={".gitignore": kept, f"{folder}/{draw.name()}.py": _source(draw)},
        after={".gitignore": f"{kept}{folder}/{file}\n"},
        solution=(f"echo {folder}/{file}>>.gitignore",),
        condition=f"grep -qx {folder}/{file} .gitignore",
        complaint=f"{folder}/{file} is not ignored",
    )


def remove_line(draw: Draw) -> Draft:
    file, gone, kept = draw.name(), draw.name(), draw.name()
    path = file + draw.pick(".py", ".txt")
    lines = draw.shuffled(*(f"{name}={draw.number(10, 99)}" for name in (gone, kept, draw.name())))
    return Draft(
        instruction=f"In {path}, remove the line of {gone}.",
        before={path: _lines(lines)},
        after={path: _lines([line for line in lines if gone not in line])},
        solution=(f"sed -i /{gone}/d {path}",),
        condition=f"! grep -q {gone} {path}",
        complaint=f"{path}: {gone} is still there",
    )


def copy_example(draw: Draw) -> Draft:
    example, target = draw.name(), draw.name()
    suffix = draw.pick(".toml", ".yml")
    body = f"{draw.name()}={draw.number(10, 99)}\n"
    return Draft(
        instruction=f"Copy {example}{suffix} to {target}{suffix}.",
        before={example + suffix: body},
        after={example + suffix: body, target + suffix: body},
        solution=(f"cp {example}{suffix} {target}{suffix}",),
        condition=f"test -f {target}{suffix}",
        complaint=f"{target}{suffix} is missing",
    )


def failing_test(draw: Draw) -> Draft:
    path = draw.name() + draw.pick(".lock", ".txt", ".log", ".yml")
    return Draft(
        instruction="Make test.sh pass.",
        before={f"{draw.name()}.py": _source(draw)},
        after={path: ""},
        solution=("sh test.sh", f"touch {path}"),
        condition=f"test -f {path}",
        complaint=f"{path} is missing",
    )


TEMPLATES: dict[str, Callable[[Draw], Draft]] = {
    "config": config,
    "constant": constant,
    "rename-file": rename_file,
    "rename-function": rename_function,
    "move-file": move_file,
    "off-by-one": off_by_one,
    "missing-import": missing_import,
    "wrong-path": wrong_path,
    "json-value": json_value,
    "csv-row": csv_row,
    "permission": permission,
    "ignore-file": ignore_file,
    "remove-line": remove_line,
    "copy-example": copy_example,
    "failing-test": failing_test,
}
