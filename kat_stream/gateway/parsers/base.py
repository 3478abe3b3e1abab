"""What a tool-call parser is.

Invariant: a text that does not parse stays text, to the last character; nothing the policy wrote is repaired. Where a
family writes JSON, arguments are kept byte for byte; where it writes tags, they become JSON by the tool's own schema.
Reading costs in proportion to the text, whatever it is: a parser runs on the event loop that serves all sessions. So a
mark is looked for once from where the one before it was found, and nothing is looked for again behind one that is not
there; no expression has two ways to match the same characters.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

Tools = list[dict[str, Any]]


class Written(NamedTuple):
    """A call as the policy wrote it: `arguments` is JSON text, `said` its own id of it, where its family writes one."""

    name: str
    arguments: str
    said: str = ""


Calls = list[Written]
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


def blocks(text: str, opening: str, closing: str) -> tuple[list[str], str]:
    """What stands between each opening and the next closing, and the text without all of these."""
    bodies: list[str] = []
    rest: list[str] = []
    at = 0
    while (begin := text.find(opening, at)) >= 0 and (end := text.find(closing, begin + len(opening))) >= 0:
        rest.append(text[at:begin])
        bodies.append(text[begin + len(opening) : end])
        at = end + len(closing)
    return bodies, "".join(rest) + text[at:]


def listed(text: str, opening: re.Pattern[str], closing: str) -> list[tuple[str, str]] | None:
    """The group of each opening and what stands between it and the next closing; None if that is not the whole text.

    An opening begins with the white space that may stand before it.
    """
    items: list[tuple[str, str]] = []
    text, at = text.rstrip(), 0
    while at < len(text):
        opened = opening.match(text, at)
        end = text.find(closing, opened.end()) if opened is not None else -1
        if opened is None or end < 0:
            return None
        items.append((opened.group(1), text[opened.end() : end]))
        at = end + len(closing)
    return items


def sectioned(
    begin: str, end: str, opening: re.Pattern[str], closing: str, read: Callable[[str, str], Written | None]
) -> ToolParser:
    """A parser of one section at the end of a text; `opening` and `closing` of its calls are as for `listed`.

    `read` makes a call of an opening's group and what follows it, or None: then nothing of the text is a call.
    """

    def parse(text: str, _tools: Tools | None = None) -> Parsed:
        before, opened, section = text.partition(begin)
        body, closed, after = section.partition(end)
        items = listed(body, opening, closing) if opened and closed and not after.strip() else None
        calls: Calls = []
        for head, tail in items or ():
            made = read(head, tail)
            if made is None or not is_object(made.arguments):
                return text, []
            calls.append(made._replace(arguments=made.arguments.strip()))
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
