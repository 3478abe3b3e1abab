"""What an agent's own log says that the policy said, compared with our records.

Owns the one reading of all formats: JSON whose assistants and calls can be told by the names of their fields (a file, a
line of it, or a row that a query finds where the files are an SQLite database), and the text that aider writes.
Invariant: a call is compared by name and value of its arguments, a text without the white space around it.
"""

from __future__ import annotations

import io
import re
import sqlite3
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from topics import Turn

_POLICY = frozenset({("role", "assistant"), ("role", "model"), ("type", "assistant"), ("type", "gemini")})
_OTHERS = frozenset({"user", "system", "developer", "tool"})
_ARGUMENTS = ("arguments", "input", "args")
_TEXTS = ("content", "text")
_AIDER = re.compile(r"^LLM RESPONSE \S+\n((?:ASSISTANT .*\n)+)", re.MULTILINE)
_json = msgspec.json.Encoder(order="deterministic")
Words = tuple[set[str], set[str]]
"""Texts, and calls as `name arguments`."""


def differences(log: bytes, turns: Sequence[Turn], query: str = "") -> list[str]:
    """Where the agent's own log (its files as a tar; empty: none) and the records of its calls differ.

    `query`: the files are an SQLite database, and this gives rows whose first column is JSON.
    """
    files = _files(log)
    try:
        texts, calls = _said(_rows(files, query) if query and files else _values(files))
    except (sqlite3.Error, msgspec.DecodeError) as error:
        return [f"the agent's own log cannot be read: {error}"]
    said, called = _in_records(turns)
    if not texts and not calls:
        return ["the agent's own log holds nothing that the policy said"]
    return [
        *(f"the agent's own log lacks {what!r}" for what in sorted((said - texts) | (called - calls))),
        *(f"the agent's own log has {what!r}, no record has" for what in sorted((texts - said) | (calls - called))),
    ]


def _in_records(turns: Sequence[Turn]) -> Words:
    told = [turn for turn in turns if not turn.side and turn.finish_reason != "abort"]
    calls = [call for turn in told if turn.tool_calls for call in msgspec.json.decode(turn.tool_calls)]
    texts = {turn.content.strip() for turn in told} - {""}
    return texts, {_call(call["name"], call["arguments"]) for call in calls}


def _said(values: Iterator[Any]) -> Words:
    texts: set[str] = set()
    calls: set[str] = set()
    for value in values:
        _read(value, False, texts, calls)
    return texts - {""}, calls


def _files(log: bytes) -> dict[str, bytes]:
    """Content by name without its directory; ids of sessions and events keep the names apart."""
    if not log:
        return {}
    with tarfile.open(fileobj=io.BytesIO(log)) as archive:
        read = {member.name: archive.extractfile(member) for member in archive if member.isfile()}
        return {PurePosixPath(name).name: file.read() for name, file in read.items() if file is not None}


def _values(files: dict[str, bytes]) -> Iterator[Any]:
    """One JSON value a file, or one a line; a line that was being written when the agent ended is none."""
    for file in files.values():
        try:
            yield msgspec.json.decode(file)
        except msgspec.DecodeError:
            for line in file.splitlines():
                with suppress(msgspec.DecodeError):
                    yield msgspec.json.decode(line)
            for said in _AIDER.findall(file.decode(errors="replace")):
                yield {"role": "assistant", "content": re.sub(r"^ASSISTANT ", "", said, flags=re.MULTILINE)}


def _rows(files: dict[str, bytes], query: str) -> Iterator[Any]:
    """The first columns; what was not yet moved into the database (NAME-wal) counts."""
    with tempfile.TemporaryDirectory(prefix="kat-own-log-") as directory:
        for name, content in files.items():
            (Path(directory) / name).write_bytes(content)
        with closing(sqlite3.connect(Path(directory) / min(files, key=len))) as database:
            for row in database.execute(query):
                yield msgspec.json.decode(str(row[0]))


def _read(value: Any, speaking: bool, texts: set[str], calls: set[str]) -> None:
    """`speaking`: the value is part of what the policy said."""
    if isinstance(value, list):
        for part in value:
            _read(part, speaking, texts, calls)
    if not isinstance(value, dict) or value.get("thought") is True:
        return
    told = {(key, who) for key in ("role", "type") if isinstance(who := value.get(key), str)}
    speaking = bool(told & _POLICY) or (speaking and value.get("role") not in _OTHERS)
    name = value.get("name")
    made = next((key for key in _ARGUMENTS if key in value), "") if isinstance(name, str) else ""
    if made:
        calls.add(_call(str(name), value[made]))
    for key, part in value.items():
        if speaking and key in _TEXTS and isinstance(part, str):
            texts.add(part.strip())
        elif key != made:
            # OpenHands keeps what is said beside a call as its thought.
            _read(part, speaking or key == "thought", texts, calls)


def _call(name: str, arguments: Any) -> str:
    if isinstance(arguments, str):
        with suppress(msgspec.DecodeError):
            arguments = msgspec.json.decode(arguments)
    return f"{name} {_json.encode(arguments).decode()}"
