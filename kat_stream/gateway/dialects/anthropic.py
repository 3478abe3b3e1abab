"""Anthropic messages and count_tokens. Wire facts: research/routing_streaming.md D1, research/scaffolds.md.

Invariant: see dialects/base.py. Blocks become messages in their order: results of tools are messages of their own, so
that a history is the same whether a client writes texts or lists, and wherever it puts its cache marks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import msgspec

from kat_stream.errors import ContextOverflow, RequestRefused
from kat_stream.gateway.dialects.base import (
    COMMENT,
    arguments_value,
    as_written,
    decode,
    encode,
    event,
    function_tool,
    only_text,
    positive,
    stop_strings,
)
from kat_stream.gateway.messages import Message, ModelCall, Reply, ToolCall, join_text
from kat_stream.gateway.stream_text import Shown

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_BILLING = "x-anthropic-billing-header:"
"""Claude Code's first block of instructions: it differs from thread to thread and says nothing to a policy."""
_HOSTED = ("web_search", "web_fetch", "code_execution", "tool_search", "memory", "mcp", "advisor")
"""Tools that run at the provider; a policy here cannot use them, and agents offer them unasked."""


class _Block(msgspec.Struct):
    type: str
    text: str = ""
    thinking: str = ""
    id: str = ""
    name: str = ""
    input: msgspec.Raw = msgspec.Raw(b"{}")
    tool_use_id: str = ""
    tool_name: str = ""
    content: str | list[_Block] | None = None


class _Message(msgspec.Struct):
    role: Literal["user", "assistant", "system"]
    content: str | list[_Block]


class _Tool(msgspec.Struct):
    name: str
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None


class _Asked(msgspec.Struct, omit_defaults=True):
    """Fields that are recorded as asked for."""

    model: str = ""
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None
    thinking: Any = None
    output_config: Any = None
    tool_choice: Any = None


class _Body(msgspec.Struct):
    messages: list[_Message]
    system: str | list[_Block] | None = None
    tools: list[_Tool] | None = None
    stream: bool | None = False


_body = msgspec.json.Decoder(_Body)
_asked = msgspec.json.Decoder(_Asked)


class AnthropicMessages:
    """Dialect `messages`."""

    name = "messages"

    def read(self, body: bytes, target: str) -> ModelCall:
        """A request body as a model call; RequestRefused (400) names the field."""
        request, asked = decode(_body, body), decode(_asked, body)
        if not request.messages:
            raise RequestRefused("messages: at least one message is required", "messages")
        tools = [made for i, tool in enumerate(request.tools or ()) if (made := _tool(tool, i)) is not None]
        refused = isinstance(asked.tool_choice, dict) and asked.tool_choice.get("type") == "none"
        messages = [message for i, given in enumerate(request.messages) for message in _messages(given, i)]
        return ModelCall(
            dialect=self.name,
            messages=(*_system(request.system), *messages),
            tools=tools or None,
            tools_allowed=bool(tools) and not refused,
            max_tokens=positive(asked.max_tokens, "max_tokens"),
            stop=stop_strings(asked.stop_sequences, "stop_sequences"),
            stream=bool(request.stream),
            model=asked.model,
            asked=encode(asked).decode(),
        )

    def reply(self, asked: ModelCall, reply: Reply) -> bytes:
        """A whole `message`."""
        content: list[dict[str, Any]] = []
        if reply.reasoning:
            content.append({"type": "thinking", "thinking": reply.reasoning, "signature": reply.turn_id})
        if reply.content or not reply.tool_calls:
            content.append({"type": "text", "text": reply.content})
        content += [_tool_use(call, arguments_value(call.arguments)) for call in reply.tool_calls]
        head = _head(asked, reply.turn_id, reply.prompt_tokens, reply.completion_tokens)
        return encode(head | {"content": content} | _stopped(reply))

    def stream(self, asked: ModelCall, turn_id: str, prompt_tokens: int) -> MessageStream:
        return MessageStream(asked, turn_id, prompt_tokens)

    def counted(self, tokens: int) -> bytes:
        return encode({"input_tokens": tokens})

    def error(self, error: RequestRefused) -> bytes:
        """An error in Anthropic's shape and, for a full context, in Anthropic's words."""
        kind = _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
        message = str(error)
        if isinstance(error, ContextOverflow):
            message = f"prompt is too long: {error.tokens} tokens > {error.limit} maximum"
        return encode({"type": "error", "error": {"type": kind, "message": message}})


class MessageStream:
    """One streamed answer: blocks one after the other, each opened when its first piece is known."""

    alive = COMMENT

    def __init__(self, asked: ModelCall, turn_id: str, prompt_tokens: int) -> None:
        self._asked, self._turn_id, self._prompt_tokens = asked, turn_id, prompt_tokens
        self._index = -1
        self._open = ""

    def start(self) -> bytes:
        head = _head(self._asked, self._turn_id, self._prompt_tokens, 0)
        message = head | {"content": [], "stop_reason": None, "stop_sequence": None}
        return _event({"type": "message_start", "message": message})

    def reasoning(self, delta: str) -> bytes:
        opening = self._block("thinking", {"type": "thinking", "thinking": "", "signature": ""})
        return opening + self._delta({"type": "thinking_delta", "thinking": delta})

    def text(self, delta: str) -> bytes:
        return self._block("text", {"type": "text", "text": ""}) + self._delta({"type": "text_delta", "text": delta})

    def end(self, reply: Reply, shown: Shown) -> bytes:
        """What was not shown yet, tool calls whole, stop reason, usage."""
        out = self.reasoning(rest) if (rest := reply.reasoning[shown.reasoning :]) else b""
        rest = reply.content[shown.content :]
        if rest or not (reply.content or reply.tool_calls):
            out += self.text(rest)
        for call in reply.tool_calls:
            out += self._block(call.id, _tool_use(call, {}))
            out += self._delta({"type": "input_json_delta", "partial_json": call.arguments})
        out += self._close()
        usage = _usage(reply.prompt_tokens, reply.completion_tokens)
        out += _event({"type": "message_delta", "delta": _stopped(reply), "usage": usage})
        return out + _event({"type": "message_stop"})

    def failed(self, error: RequestRefused) -> bytes:
        return b"event: error\ndata: " + AnthropicMessages().error(error) + b"\n\n"

    def _block(self, name: str, block: dict[str, Any]) -> bytes:
        """Open this block unless it is open."""
        if self._open == name:
            return b""
        out = self._close()
        self._index, self._open = self._index + 1, name
        return out + _event({"type": "content_block_start", "index": self._index, "content_block": block})

    def _close(self) -> bytes:
        if not self._open:
            return b""
        out = b""
        if self._open == "thinking":
            # Clients give thinking back only if it is signed; the signature says whose it is.
            out = self._delta({"type": "signature_delta", "signature": self._turn_id})
        self._open = ""
        return out + _event({"type": "content_block_stop", "index": self._index})

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event({"type": "content_block_delta", "index": self._index, "delta": delta})


def _event(value: dict[str, Any]) -> bytes:
    return event(value, value["type"])


def _system(system: str | list[_Block] | None) -> list[Message]:
    texts = [system] if isinstance(system, str) else [_text(b, f"system[{i}]") for i, b in enumerate(system or ())]
    texts = [text for text in texts if text and not text.startswith(_BILLING)]
    return [Message(role="system", content=join_text(texts, "system"))] if texts else []


def _messages(given: _Message, index: int) -> Iterator[Message]:
    blocks = [_Block("text", text=given.content)] if isinstance(given.content, str) else given.content
    if given.role == "assistant":
        yield _assistant(blocks, f"messages[{index}]")
        return
    texts: list[str] = []
    for i, block in enumerate(blocks):
        where = f"messages[{index}].content[{i}]"
        if block.type != "tool_result":
            texts.append(_text(block, where))
            continue
        if texts:
            yield Message(role=given.role, content=join_text(texts, given.role))
            texts = []
        yield Message(role="tool", content=_result(block, where), tool_call_id=block.tool_use_id)
    if texts or not blocks:
        yield Message(role=given.role, content=join_text(texts, given.role))


def _assistant(blocks: list[_Block], where: str) -> Message:
    texts, thoughts, calls = [], [], []
    for i, block in enumerate(blocks):
        if block.type == "thinking":
            thoughts.append(block.thinking)
        elif block.type == "tool_use":
            calls.append(ToolCall(block.id, block.name, as_written(block.input)))
        elif block.type != "redacted_thinking":
            texts.append(_text(block, f"{where}.content[{i}]"))
    content = join_text(texts, "assistant")
    return Message(role="assistant", content=content, tool_calls=tuple(calls), reasoning="".join(thoughts))


def _result(block: _Block, where: str) -> str:
    if block.content is None or isinstance(block.content, str):
        return block.content or ""
    texts = [
        inner.tool_name if inner.type == "tool_reference" else _text(inner, f"{where}.content[{i}]")
        for i, inner in enumerate(block.content)
    ]
    return join_text(texts, "tool")


def _text(block: _Block, where: str) -> str:
    if block.type != "text":
        raise only_text(block.type, where)
    return block.text


def _tool(tool: _Tool, index: int) -> dict[str, Any] | None:
    if tool.input_schema is not None:
        return function_tool(tool.name, tool.description, tool.input_schema)
    if tool.type is not None and tool.type.startswith(_HOSTED):
        return None
    where = f"tools[{index}].input_schema"
    raise RequestRefused(f"{where}: a tool of type {tool.type or 'custom'!r} needs a schema here", where)


def _tool_use(call: ToolCall, value: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": value}


def _head(asked: ModelCall, turn_id: str, prompt: int, sampled: int) -> dict[str, Any]:
    usage = _usage(prompt, sampled)
    return {"id": f"msg{turn_id}", "type": "message", "role": "assistant", "model": asked.model, "usage": usage}


def _usage(prompt: int, sampled: int) -> dict[str, int]:
    # Cached tokens are known only at the end; all are counted as input from the start, so that both counts agree.
    cached = {"cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}
    return {"input_tokens": prompt, "output_tokens": sampled} | cached


def _stopped(reply: Reply) -> dict[str, Any]:
    if reply.tool_calls and reply.finish_reason == "stop":
        return {"stop_reason": "tool_use", "stop_sequence": None}
    if reply.finish_reason == "length":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    reason = "stop_sequence" if reply.matched_stop else "end_turn"
    return {"stop_reason": reason, "stop_sequence": reply.matched_stop or None}
