"""What an agent's own log says that the policy said, compared with our records. Pure.

Owns the one reading of all formats: sessions of Codex, transcripts of Claude Code, chats of Qwen Code and Gemini CLI,
trajectories of mini-swe-agent are JSON whose assistants and calls can be told by the names of their fields. Invariant:
a call is compared by name and value of its arguments, a text without the white space around it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import msgspec

from topics import Turn

_POLICY = frozenset({("role", "assistant"), ("role", "model"), ("type", "assistant"), ("type", "gemini")})
_OTHERS = frozenset({"user", "system", "developer", "tool"})
_ARGUMENTS = ("arguments", "input", "args")
_TEXTS = ("content", "text")
_json = msgspec.json.Encoder(order="deterministic")
Words = tuple[set[str], set[str]]
"""Texts, and calls as `name arguments`."""


def differences(log: bytes, turns: Sequence[Turn]) -> list[str]:
    """Where the agent's own log (files, each ended by a NUL) and the records of its calls differ."""
    texts, calls = _in_log(log)
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


def _in_log(log: bytes) -> Words:
    texts: set[str] = set()
    calls: set[str] = set()
    for file in log.split(b"\0"):
        for value in _values(file):
            _read(value, False, texts, calls)
    return texts - {""}, calls


def _values(file: bytes) -> Iterator[Any]:
    """One JSON value, or one a line; a line that was being written when the agent ended is none."""
    try:
        yield msgspec.json.decode(file)
    except msgspec.DecodeError:
        for line in file.splitlines():
            with suppress(msgspec.DecodeError):
                yield msgspec.json.decode(line)


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
            _read(part, speaking, texts, calls)


def _call(name: str, arguments: Any) -> str:
    if isinstance(arguments, str):
        with suppress(msgspec.DecodeError):
            arguments = msgspec.json.decode(arguments)
    return f"{name} {_json.encode(arguments).decode()}"
