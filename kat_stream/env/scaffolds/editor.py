"""`str_replace_editor` of SWE-agent (tools/edit_anthropic): view, create, str_replace, insert, undo_edit on a file.

Owns what an edit is, and the texts before each edit of a rollout. Invariant: a file is changed by exactly the edit that
is told, or not at all and the reason is told; the file keeps its mode, and a symbolic link stays one.
"""

from __future__ import annotations

import re
from itertools import islice
from typing import Literal

import msgspec

from kat_stream.env.sandboxes.base import ExecResult, Sandbox
from kat_stream.errors import SandboxDied, SandboxError

TIMEOUT_S = 30.0
FILE_LIMIT = 4 << 20
"""Bytes of a file that can be edited."""
AROUND = 4
"""Lines shown on both sides of an edit."""
PLACES = 10
"""Of an old_str that is found too often, those that are told: a policy may ask for every `e` of a large file."""
_NO_DIRECTORY = 46
_LIST = f'[ -d "$1" ] || exit {_NO_DIRECTORY}; cd -- "$1" && find . -maxdepth 2 -not -path "*/.*" | sort'
_WRITE = 'mkdir -p -- "$(dirname -- "$1")" && cat > "$1"'
_REMOVE = 'rm -f -- "$(readlink -f -- "$1")"'


class Refused(Exception):
    """An edit that cannot be made; the policy is told why."""


class Edit(msgspec.Struct, frozen=True):
    """The tool's arguments."""

    command: Literal["view", "create", "str_replace", "insert", "undo_edit"]
    path: str
    file_text: str | None = None
    old_str: str | None = None
    new_str: str | None = None
    insert_line: int | None = None
    view_range: tuple[int, ...] | None = None


class Editor:
    """The files of one sandbox."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._before: dict[str, list[str]] = {}
        """Path -> its texts before each edit, the newest last."""

    async def run(self, edit: Edit) -> str:
        """What the policy sees of it. Refused; SandboxDied if the sandbox is gone."""
        if not edit.path.startswith("/") or "\0" in edit.path:
            raise Refused(f"path {edit.path!r} is not absolute; the work tree is {self._sandbox.spec.workdir}")
        match edit.command:
            case "view":
                return await self._view(edit)
            case "create":
                return await self._create(edit)
            case "undo_edit":
                return await self._undo(edit.path)
        text = await self._read(edit.path)
        changed, line = _replaced(text, edit) if edit.command == "str_replace" else _inserted(text, edit)
        await self._write(edit.path, changed, text.encode())
        self._before.setdefault(edit.path, []).append(text)
        last = line + (edit.new_str or "").count("\n")
        return f"{edit.path} has been edited. It reads now:\n{numbered(changed, line - AROUND, last + AROUND)}"

    async def _view(self, edit: Edit) -> str:
        listing = await self._sandbox.exec(self._script(_LIST, edit.path), timeout_s=TIMEOUT_S)
        if listing.exit_code == 0:
            return f"Files in {edit.path}, two levels deep:\n{listing.stdout.decode('utf-8', errors='replace')}"
        text = await self._read(edit.path)
        first, last = _range(text, edit.view_range)
        return f"{edit.path}, lines numbered as by `cat -n`:\n{numbered(text, first, last)}"

    async def _create(self, edit: Edit) -> str:
        if edit.file_text is None:
            raise Refused("create needs file_text")
        there = await self._sandbox.exec(self._script('[ -e "$1" ]', edit.path), timeout_s=TIMEOUT_S)
        if there.exit_code == 0:
            raise Refused(f"{edit.path} exists already; change it by str_replace or insert")
        await self._write(edit.path, edit.file_text, None)
        return f"{edit.path} has been created."

    async def _undo(self, path: str) -> str:
        if not self._before.get(path):
            raise Refused(f"no edit of {path} is left to undo")
        await self._write(path, self._before[path][-1], await self._held(path))
        self._before[path].pop()
        return f"The last edit of {path} has been undone."

    async def _read(self, path: str) -> str:
        held = await self._held(path)
        if held is None:
            raise Refused(f"{path} does not exist")
        try:
            return held.decode()
        except UnicodeDecodeError:
            raise Refused(f"{path} is not text in UTF-8") from None

    async def _held(self, path: str) -> bytes | None:
        """What is in a file; None if there is none."""
        try:
            return await self._sandbox.read_file(path, FILE_LIMIT)
        except FileNotFoundError:
            return None
        except SandboxDied:
            raise
        except SandboxError as error:
            raise Refused(str(error)) from None

    async def _write(self, path: str, text: str, before: bytes | None) -> None:
        """Write a file that held `before` (None: that was not there), and holds it again if it is Refused."""
        done = await self._put(path, text.encode())
        if done.exit_code == 0:
            return
        why = f"{path} cannot be written: {done.stderr.decode('utf-8', errors='replace').strip()[-300:]}"
        # The writing began by making the file empty, which a full disk allows.
        if before is None:
            await self._sandbox.exec(self._script(_REMOVE, path), timeout_s=TIMEOUT_S)
        else:
            await self._put(path, before)
        kept = await self._held(path) == before
        raise Refused(why if kept else f"{why}; what it held before could not be put back")

    async def _put(self, path: str, content: bytes) -> ExecResult:
        return await self._sandbox.exec(self._script(_WRITE, path), timeout_s=TIMEOUT_S, stdin=content)

    def _script(self, script: str, path: str) -> list[str]:
        return ["/bin/sh", "-c", script, "sh", self._sandbox.root + path]


def numbered(text: str, first: int, last: int) -> str:
    """Lines `first` to `last`, counted from 1 and cut to what there is, as `cat -n` shows them."""
    lines = _lines(text)
    start = max(first, 1)
    return "".join(f"{number:6}\t{line}\n" for number, line in enumerate(lines[start - 1 : max(last, 0)], start))


def _lines(text: str) -> list[str]:
    return text.removesuffix("\n").split("\n") if text else []


def _range(text: str, asked: tuple[int, ...] | None) -> tuple[int, int]:
    count = len(_lines(text))
    if asked is None:
        return 1, count
    first, last = asked if len(asked) == 2 else (0, 0)
    last = count if last == -1 else last
    if not 1 <= first <= last <= count:
        raise Refused(f"view_range {list(asked)} is not [first, last] of lines 1 to {count}; -1 is the last")
    return first, last


def _replaced(text: str, edit: Edit) -> tuple[str, int]:
    """The text with old_str, found once, replaced; and the line on which it began."""
    if not edit.old_str:
        raise Refused("str_replace needs old_str")
    found = islice(re.finditer(re.escape(edit.old_str), text), PLACES)
    starts = [text.count("\n", 0, match.start()) + 1 for match in found]
    if not starts:
        raise Refused(f"old_str does not appear in {edit.path} as it is given; nothing was replaced")
    if len(starts) > 1:
        raise Refused(f"old_str appears in {edit.path} on lines {starts}; nothing was replaced: give more around it")
    return text.replace(edit.old_str, edit.new_str or ""), starts[0]


def _inserted(text: str, edit: Edit) -> tuple[str, int]:
    """The text with new_str as lines after line `insert_line`, and the first line of it."""
    if edit.new_str is None or edit.insert_line is None:
        raise Refused("insert needs insert_line and new_str")
    lines = text.split("\n")
    count = len(_lines(text))
    if not 0 <= edit.insert_line <= count:
        raise Refused(f"insert_line {edit.insert_line} is not one of 0 to {count}")
    lines[edit.insert_line : edit.insert_line] = edit.new_str.removesuffix("\n").split("\n")
    return "\n".join(lines), edit.insert_line + 1
