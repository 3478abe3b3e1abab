"""What a chat template puts around messages, found by asking it; and text that it wrote as messages again.

Records hold token ids, not the agent's requests: a prompt's messages are read back from its text. Invariant: every
character of a text is in a message or is the template's own; a text of another form is a DataError, never guessed at.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kat_stream.errors import DataError, RequestRefused
from kat_stream.gateway.messages import Message, ToolCall
from kat_stream.gateway.parsers.base import ToolParser
from kat_stream.gateway.render import Renderer, Tools
from kat_stream.gateway.tools import family, get_parser, read_reply

_SYSTEM, _USER, _SAID, _NEXT, _RESULT = (f"KatStreamMark{letter}" for letter in "SUANT")
_ASKED = {"role": "user", "content": _USER}
_CALL = {"id": "call0", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}


@dataclass(frozen=True, slots=True)
class Around:
    """The text before and behind what a role says."""

    opening: str
    closing: str


@dataclass(frozen=True, slots=True)
class Marks:
    """A template's signs. `between_results`: what joins the results of parallel calls, empty if they stand apart."""

    roles: dict[str, Around]
    begin: str
    """What may stand before the first message."""
    between_results: str
    parser: ToolParser
    thinks: bool

    def read(self, text: str, tools: Tools | None) -> list[Message]:
        """Messages of a piece of a prompt; it may begin with the end of a reply, and ends where the policy is asked.

        DataError if something in it is in no message.
        """
        found = list(self._openings().finditer(text))
        lead = text[: found[0].start()] if found else text
        if lead not in (self.begin, "") and not self.roles["assistant"].closing.endswith(lead):
            raise DataError(f"the chat template writes no message like {lead[:60]!r}")
        ends = [*(match.start() for match in found), len(text)][1:]
        messages: list[Message] = []
        for match, end in zip(found, ends, strict=True):
            role, body = self._role(match.group()), text[match.end() : end]
            if role == "assistant" and end == len(text):
                break  # the policy is asked
            messages += self._messages(role, self._content(role, body), tools, len(messages))
        return messages

    def _openings(self) -> re.Pattern[str]:
        openings = sorted({around.opening for around in self.roles.values()}, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, openings)))

    def _role(self, opening: str) -> str:
        return next(role for role, around in self.roles.items() if around.opening == opening)

    def _content(self, role: str, body: str) -> str:
        """What stands before the end of a message."""
        # Templates put no line break behind some messages of their own.
        for closing in (self.roles[role].closing, self.roles[role].closing.rstrip()):
            if body.endswith(closing):
                return body[: len(body) - len(closing)]
        raise DataError(f"a message of {role} does not end as the chat template ends it: {body[-60:]!r}")

    def _messages(self, role: str, content: str, tools: Tools | None, number: int) -> Iterator[Message]:
        if role == "assistant":
            said = read_reply(self.parser, content, f"h{number}x", tools=tools, thinks=self.thinks)
            yield Message(role=role, content=said.content, tool_calls=said.tool_calls, reasoning=said.reasoning)
        elif role == "tool" and self.between_results:
            yield from (Message(role=role, content=part) for part in content.split(self.between_results))
        else:
            yield Message(role=role, content=content)


def find_marks(renderer: Renderer) -> Marks:
    """Ask a template how it writes each role; a role that it refuses is not among the marks."""
    said = {"role": "assistant", "content": _SAID}
    text = renderer.text([_ASKED, said, {"role": "user", "content": _NEXT}], None)
    closing = renderer.closing
    user = text.partition(_SAID)[2].partition(_NEXT)[0].removeprefix(closing)
    user_closing = renderer.text([_ASKED], None, ask=False).partition(_USER)[2]
    assistant = text.partition(_USER)[2].partition(_SAID)[0].removeprefix(user_closing)
    roles = {"assistant": Around(assistant, closing), "user": Around(user, user_closing)}
    begin = text.partition(_USER)[0].removesuffix(user)
    results = ""
    if system := _system(renderer, user):
        begin, roles["system"] = _shared(begin, system.opening), system
        roles["system"] = Around(system.opening.removeprefix(begin), system.closing)
    if tool := _tool(renderer, roles["assistant"]):
        roles["tool"], results = tool
    if not all(around.opening for around in roles.values()):
        raise DataError("the chat template does not set messages apart: no messages can be read from its text")
    return Marks(roles, begin, results, get_parser(family(renderer.template)), renderer.thinks)


def split_tools(renderer: Renderer, marks: Marks, system: str) -> tuple[str | None, Tools | None]:
    """What an agent's system message said, None if it had none, and the tools that the template wrote into it."""
    tools = _definitions(system)
    if not tools:
        return system, None
    alone = _first_system(renderer, marks, [_ASKED], tools)
    if alone == system:
        return None, tools
    both = _first_system(renderer, marks, [{"role": "system", "content": _SYSTEM}, _ASKED], tools)
    before, mark, after = (both or "").partition(_SYSTEM)
    if mark and system.startswith(before) and system.endswith(after):
        return system[len(before) : len(system) - len(after)], tools
    return system, None


def _shared(begin: str, opening: str) -> str:
    """The beginning-of-text sign: of what stands before a first user, the part that also stands before a system."""
    size = next((n for n in range(len(begin), 0, -1) if opening.startswith(begin[:n])), 0)
    return begin[:size] if size < len(opening) else ""


def _system(renderer: Renderer, user: str) -> Around | None:
    try:
        text = renderer.text([{"role": "system", "content": _SYSTEM}, _ASKED], None)
    except RequestRefused:
        return None
    opening, mark, rest = text.partition(_SYSTEM)
    return Around(opening, rest.partition(_USER)[0].removesuffix(user)) if mark else None


def _tool(renderer: Renderer, assistant: Around) -> tuple[Around, str] | None:
    """How a result of a tool is written, and what joins two of one reply."""
    called = {"role": "assistant", "content": _SAID, "tool_calls": [_CALL]}
    result = {"role": "tool", "content": _RESULT, "tool_call_id": "call0", "name": "f"}
    said = {"role": "assistant", "content": _NEXT}
    try:
        one = renderer.text([_ASKED, called, result, said, _ASKED], None)
        both = {**called, "tool_calls": [_CALL, {**_CALL, "id": "call1"}]}
        two = renderer.text([_ASKED, both, result, {**result, "tool_call_id": "call1"}, said], None)
    except RequestRefused:
        return None
    head, mark, rest = one.partition(_RESULT)
    opening = head.rpartition(assistant.closing)[2]
    between = two.partition(_RESULT)[2].partition(_RESULT)[0]
    closing = rest.partition(_NEXT)[0].removesuffix(assistant.opening)
    return (Around(opening, closing), "" if between == closing + opening else between) if mark else None


def _first_system(renderer: Renderer, marks: Marks, messages: list[dict[str, Any]], tools: Tools) -> str | None:
    try:
        first = marks.read(renderer.text(messages, tools), None)[0]
    except (RequestRefused, DataError):
        return None
    return first.content if first.role == "system" else None


def _definitions(text: str) -> Tools:
    """The JSON objects in a text that define functions, in their order, each as chat templates take it."""
    decoder, tools, at = json.JSONDecoder(), Tools(), text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except (json.JSONDecodeError, RecursionError):
            value, end = None, at + 1
        if _defines(value):
            tools.append(value if "function" in value else {"type": "function", "function": value})
        at = text.find("{", end)
    return tools


def _defines(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    inner = value.get("function", value)
    return isinstance(inner, dict) and isinstance(inner.get("name"), str) and "parameters" in inner


def answered(messages: list[Message]) -> list[Message]:
    """Results of tools under the ids that the template gets for the calls before them, in the order of the calls."""
    waiting: list[ToolCall] = []
    out: list[Message] = []
    for message in messages:
        if message.role == "assistant":
            waiting = list(message.tool_calls)
        elif message.role == "tool" and waiting:
            call = waiting.pop(0)
            message = Message(role="tool", content=message.content, tool_call_id=call.shown_id, name=call.name)
        out.append(message)
    return out
