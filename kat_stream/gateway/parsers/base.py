"""What a tool-call parser is.

Invariant: a text that does not parse stays text, to the last character; nothing the policy wrote is repaired. Where a
family writes JSON, arguments are kept byte for byte; where it writes tags, they become JSON by the tool's own schema.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

Tools = list[dict[str, Any]]
Calls = list[tuple[str, str]]
"""Name, and arguments as JSON text, of each call."""
Parsed = tuple[str, Calls]
"""Visible content, and the calls."""


@dataclass(frozen=True, slots=True)
class ToolParser:
    """`openings` begin a call: from there on a stream holds text back; `only_at_start`: nowhere else."""

    openings: tuple[str, ...]
    parse: Callable[[str, Tools | None], Parsed]
    only_at_start: bool = False

    def begins(self, text: str) -> bool:
        """Whether the text holds the beginning of a call, whatever becomes of it."""
        if self.only_at_start:
            return text.lstrip().startswith(self.openings)
        return any(opening in text for opening in self.openings)


def is_object(json: str) -> bool:
    """Whether a text is one JSON object."""
    try:
        return isinstance(msgspec.json.decode(json), dict)
    except (msgspec.DecodeError, RecursionError):
        return False


def sectioned(
    begin: str, end: str, call: re.Pattern[str], read: Callable[[str, str], tuple[str, str] | None]
) -> ToolParser:
    """A parser of one section of calls at the end of a text; `call` has the groups head and tail.

    `read` makes name and arguments of head and tail, or None: then nothing of the text is a call.
    """

    def parse(text: str, _tools: Tools | None = None) -> Parsed:
        before, opened, section = text.partition(begin)
        body, closed, after = section.partition(end)
        if not opened or not closed or after.strip() or call.sub("", body).strip():
            return text, []
        calls: Calls = []
        for head, tail in call.findall(body):
            made = read(head, tail)
            if made is None or not is_object(made[1]):
                return text, []
            calls.append((made[0], made[1].strip()))
        return (before.rstrip(), calls) if calls else (text, [])

    return ToolParser((begin,), parse)


def by_schema(name: str, arguments: list[tuple[str, str]], tools: Tools | None) -> str:
    """Arguments that were written as bare text, as a JSON object: what the schema calls a string stays text."""
    schema = _properties(name, tools)
    return msgspec.json.encode({key: _value(text, schema.get(key)) for key, text in arguments}).decode()


def _properties(name: str, tools: Tools | None) -> dict[str, Any]:
    for tool in tools or ():
        function = tool["function"]
        if function["name"] == name:
            parameters = function.get("parameters")
            found = parameters.get("properties") if isinstance(parameters, dict) else None
            return found if isinstance(found, dict) else {}
    return {}


def _value(text: str, schema: Any) -> Any:
    kind = schema.get("type") if isinstance(schema, dict) else None
    if kind == "string" or (isinstance(kind, list) and "string" in kind):
        return text
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return text
