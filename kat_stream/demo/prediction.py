"""What the demonstrations' commands print and do, computed on a dict of files instead of run.

Owns the few commands that demonstrations use. Pure: no I/O. Invariant: output, exit code and the files left equal those
of the real command in a work tree with these files; a test compares them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

Tree = dict[str, str]


class Printed(NamedTuple):
    """What a command left behind for the agent to see."""

    output: str
    exit_code: int


def predict(command: str, tree: Tree) -> Printed:
    """What one command prints; `tree` (path -> text) is changed as the command would change it.

    Raises ValueError for a command that is not one of the demonstrations'.
    """
    for pattern, action in _ACTIONS:
        if match := re.fullmatch(pattern, command):
            try:
                return Printed(action(tree, *match.groups()), 0)
            except _Failed as failed:
                return Printed(failed.output, failed.exit_code)
    raise ValueError(f"cannot predict {command!r}")


class _Failed(Exception):
    """The command complains; says what it prints and its exit code."""

    def __init__(self, output: str, exit_code: int) -> None:
        super().__init__(output)
        self.output = output
        self.exit_code = exit_code


def _read(tree: Tree, path: str, complaint: str, exit_code: int) -> str:
    if path not in tree:
        raise _Failed(complaint.format(path), exit_code)
    return tree[path]


def _cat(tree: Tree, path: str) -> str:
    return _read(tree, path, "cat: {}: No such file or directory\n", 1)


def _grep(tree: Tree, word: str, path: str) -> str:
    text = _read(tree, path, "grep: {}: No such file or directory\n", 2)
    found = "".join(line for line in text.splitlines(keepends=True) if word in line)
    if not found:
        raise _Failed("", 1)
    return found


def _substitute(tree: Tree, in_place: str | None, _sign: str, old: str, new: str, path: str) -> str:
    text = _read(tree, path, "sed: can't read {}: No such file or directory\n", 2)
    # sed replaces the first match of each line.
    result = "".join(re.sub(old, new, line, count=1) for line in text.splitlines(keepends=True))
    return _edit(tree, path, result) if in_place else result


def _delete_line(tree: Tree, word: str, path: str) -> str:
    text = _read(tree, path, "sed: can't read {}: No such file or directory\n", 2)
    return _edit(tree, path, "".join(line for line in text.splitlines(keepends=True) if word not in line))


def _insert_first(tree: Tree, line: str, path: str) -> str:
    return _edit(tree, path, f"{line}\n{tree[path]}")


def _edit(tree: Tree, path: str, text: str) -> str:
    tree[path] = text
    return ""


def _echo(tree: Tree, text: str, sign: str, path: str) -> str:
    return _edit(tree, path, f"{tree.get(path, '') if sign == '>>' else ''}{text}\n")


def _move(tree: Tree, old: str, new: str) -> str:
    _put(tree, new, old, _read(tree, old, "mv: cannot stat '{}': No such file or directory\n", 1))
    return _remove(tree, old)


def _copy(tree: Tree, old: str, new: str) -> str:
    return _put(tree, new, old, _read(tree, old, "cp: cannot stat '{}': No such file or directory\n", 1))


def _put(tree: Tree, new: str, old: str, text: str) -> str:
    return _edit(tree, new + old if new.endswith("/") else new, text)


def _remove(tree: Tree, path: str) -> str:
    del tree[path]
    return ""


def _change_mode(tree: Tree, path: str) -> str:
    _read(tree, path, "chmod: cannot access '{}': No such file or directory\n", 1)
    return ""


def _touch(tree: Tree, path: str) -> str:
    return _edit(tree, path, tree.get(path, ""))


def _make_directory(tree: Tree, path: str) -> str:
    # A directory is remembered by its trailing slash: only `ls` sees it.
    return _edit(tree, f"{path}/", "")


def _find(tree: Tree, name: str) -> str:
    return "".join(f"./{path}\n" for path in tree if path.rpartition("/")[2] == name)


def _run_test(tree: Tree) -> str:
    """The visible tests whose condition is that a file exists."""
    condition = re.search(r"^test -f (\S+) \|\| \{ echo \"(.*)\"", tree["test.sh"], re.MULTILINE)
    if condition is None:
        raise ValueError("cannot predict a test.sh that asks for more than a file")
    path, complaint = condition.groups()
    if path not in tree:
        raise _Failed(f"{complaint}\n", 1)
    return ""


def _list(tree: Tree) -> str:
    names = {path.partition("/")[0] for path in tree if not path.startswith(".")}
    return "".join(f"{name}\n" for name in sorted(names))


_ACTIONS: tuple[tuple[str, Callable[..., str]], ...] = (
    (r"cat (\S+)", _cat),
    (r"grep '?([^' ]+)'? (\S+)", _grep),
    (r"sed (-i )?s([/,:])([^/,:]+)\2([^/,:]+)\2 (\S+)", _substitute),
    (r"sed -i /(\w+)/d (\S+)", _delete_line),
    (r'sed -i "1i ([^"]+)" (\S+)', _insert_first),
    (r"echo (.+?)(>>?)(\S+)", _echo),
    (r"mv (\S+) (\S+)", _move),
    (r"cp (\S+) (\S+)", _copy),
    (r"rm (\S+)", _remove),
    (r"chmod [+-]x (\S+)", _change_mode),
    (r"touch (\S+)", _touch),
    (r"mkdir (\S+)", _make_directory),
    (r"find \. -name (\S+)", _find),
    (r"sh test\.sh", _run_test),
    (r"ls", _list),
)
