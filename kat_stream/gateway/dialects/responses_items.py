"""OpenAI responses, the request's side: items and tools of the wire to messages and tools of the policy.

Invariant: items of one reply (reasoning, message, calls, in this order) are one assistant message again. Tools that the
policy sees by another form than the wire are named in `kinds`, so that a call of them goes back as it came.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec

from kat_stream.errors import RequestRefused
from kat_stream.gateway.dialects.base import encode, function_tool, only_text
from kat_stream.gateway.messages import Message, ToolCall, join_text

CUSTOM = "custom"
"""A tool whose argument is free text: the policy sees a function of one string, `input`."""
NAMESPACE = "namespace:"
"""Tools of a namespace: the policy sees NAMESPACE__NAME."""
HOSTED = ("web_search", "file_search", "code_interpreter", "image_generation", "computer", "mcp", "tool_search")
"""Tools that run at the provider; a policy here cannot use them, and agents offer them unasked."""
_INPUT = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
_TEXTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text", "refusal")


class Part(msgspec.Struct):
    type: str
    text: str = ""
    refusal: str = ""


class Item(msgspec.Struct):
    """Any item; which fields count follows from its type."""

    type: str = "message"
    role: str = ""
    content: str | list[Part] | None = None
    call_id: str = ""
    name: str = ""
    namespace: str | None = None
    arguments: str = "{}"
    input: str = ""
    output: str | list[Part] = ""


class Tool(msgspec.Struct):
    type: str
    name: str = ""
    description: str | None = None
    parameters: Any = None
    tools: list[Tool] = []


@dataclass(slots=True)
class _Open:
    """The assistant message that items are being added to."""

    thoughts: list[str] = field(default_factory=list)
    text: str | None = None
    calls: list[ToolCall] = field(default_factory=list)

    def message(self) -> Message:
        return Message(
            role="assistant",
            content=self.text or "",
            tool_calls=tuple(self.calls),
            reasoning="".join(self.thoughts),
        )


def messages(items: list[Item]) -> list[Message]:
    """The conversation; RequestRefused names the item at fault."""
    out: list[Message] = []
    spoken: _Open | None = None
    for i, item in enumerate(items):
        assistant = item.type in ("reasoning", "function_call", "custom_tool_call") or item.role == "assistant"
        # A reply thinks, speaks, then calls: what comes in another order is another reply.
        again = spoken is not None and (
            (item.type == "reasoning" and (spoken.text is not None or bool(spoken.calls)))
            or (item.type == "message" and (spoken.text is not None or bool(spoken.calls)))
        )
        if spoken is not None and (again or not assistant):
            out.append(spoken.message())
            spoken = None
        if assistant:
            spoken = spoken or _Open()
            _add(spoken, item, f"input[{i}]")
        else:
            out.append(_message(item, f"input[{i}]"))
    return [*out, spoken.message()] if spoken is not None else out


def tools(given: list[Tool]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The policy's tools, and the kinds of those that are more than functions on the wire."""
    made: list[dict[str, Any]] = []
    kinds: dict[str, str] = {}
    for i, tool in enumerate(given):
        if tool.type == "namespace":
            for inner in tool.tools:
                name = f"{tool.name}__{inner.name}"
                made.append(function_tool(name, inner.description, inner.parameters))
                kinds[name] = NAMESPACE + tool.name
        elif tool.type == "custom":
            made.append(function_tool(tool.name, tool.description, _INPUT))
            kinds[tool.name] = CUSTOM
        elif tool.type == "function" and tool.name:
            made.append(function_tool(tool.name, tool.description, tool.parameters))
        elif not tool.type.startswith(HOSTED):
            raise RequestRefused(f"tools[{i}].type: no tool of type {tool.type!r} with a name here", f"tools[{i}].type")
    return made, kinds


def _add(spoken: _Open, item: Item, where: str) -> None:
    if item.type == "reasoning":
        spoken.thoughts.append(_texts(item.content or "", f"{where}.content", "assistant"))
    elif item.type == "function_call":
        name = f"{item.namespace}__{item.name}" if item.namespace else item.name
        spoken.calls.append(ToolCall(item.call_id, name, item.arguments))
    elif item.type == "custom_tool_call":
        spoken.calls.append(ToolCall(item.call_id, item.name, encode({"input": item.input}).decode()))
    else:
        spoken.text = _texts(item.content or "", f"{where}.content", "assistant")


def _message(item: Item, where: str) -> Message:
    if item.type in ("function_call_output", "custom_tool_call_output"):
        text = _texts(item.output, f"{where}.output", "tool")
        return Message(role="tool", content=text, tool_call_id=item.call_id)
    if item.type != "message":
        raise RequestRefused(f"{where}.type: no items of type {item.type!r} here; send the history itself", where)
    role = "system" if item.role in ("developer", "system") else item.role
    if role not in ("system", "user"):
        raise RequestRefused(f"{where}.role: no role {item.role!r}", f"{where}.role")
    return Message(role=role, content=_texts(item.content or "", f"{where}.content", role))


def _texts(content: str | list[Part], where: str, role: str) -> str:
    if isinstance(content, str):
        return content
    for i, part in enumerate(content):
        if part.type not in _TEXTS:
            raise only_text(part.type, f"{where}[{i}]")
    return join_text((part.text or part.refusal for part in content), role)
