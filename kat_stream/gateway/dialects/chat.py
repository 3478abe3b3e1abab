"""OpenAI chat completions: request, reply, stream and errors. Wire facts: research/routing_streaming.md D1.

Invariant: see dialects/base.py. Reasoning is `reasoning_content`, as the open servers and most agents call it.
"""

from __future__ import annotations

import time
from typing import Any, Literal

import msgspec

from kat_stream.errors import RequestRefused
from kat_stream.gateway.dialects.base import (
    COMMENT,
    as_written,
    decode,
    encode,
    event,
    function_tool,
    only_text,
    openai_error,
    positive,
    stop_strings,
)
from kat_stream.gateway.messages import Message, ModelCall, Reply, ToolCall, join_text
from kat_stream.gateway.stream_text import Shown


class _Part(msgspec.Struct):
    type: str
    text: str = ""


class _Function(msgspec.Struct):
    name: str
    arguments: msgspec.Raw = msgspec.Raw(b'"{}"')


class _Call(msgspec.Struct):
    function: _Function
    id: str = ""


class _Message(msgspec.Struct):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[_Part] | None = None
    tool_calls: list[_Call] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _StreamOptions(msgspec.Struct):
    include_usage: bool = False


class _Asked(msgspec.Struct, omit_defaults=True, kw_only=True):
    """Fields that are recorded as asked for."""

    model: str = ""
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    reasoning_effort: str | None = None
    tool_choice: Any = None
    response_format: Any = None


class _Body(_Asked):
    messages: list[_Message]
    tools: list[dict[str, Any]] | None = None
    stream: bool | None = False
    stream_options: _StreamOptions | None = None
    # What only other wires have: their bodies must not be taken for a conversation without instructions.
    system: Any = None
    input: Any = None
    contents: Any = None


_body = msgspec.json.Decoder(_Body)
_text = msgspec.json.Decoder(str)


class ChatCompletions:
    """Dialect `chat`."""

    name = "chat"

    def read(self, body: bytes, target: str) -> ModelCall:
        """A request body as a model call; RequestRefused (400) names the field."""
        request = decode(_body, body)
        asked = _Asked(**{field: getattr(request, field) for field in _Asked.__struct_fields__})
        for field in ("system", "input", "contents"):
            if getattr(request, field) is not None:
                raise RequestRefused(f"{field}: no field of chat completions; is this another API's request?", field)
        if not request.messages:
            raise RequestRefused("messages: at least one message is needed", "messages")
        if asked.n not in (None, 1):
            raise RequestRefused("n: only one choice a request; send several requests", "n")
        limit = asked.max_completion_tokens if asked.max_completion_tokens is not None else asked.max_tokens
        tools = [_tool(tool, i) for i, tool in enumerate(request.tools or ())]
        stop = [asked.stop] if isinstance(asked.stop, str) else asked.stop
        return ModelCall(
            dialect=self.name,
            messages=tuple(_message(message, i) for i, message in enumerate(request.messages)),
            tools=tools or None,
            tools_allowed=bool(tools) and asked.tool_choice != "none",
            max_tokens=positive(limit, "max_tokens"),
            stop=stop_strings(stop, "stop"),
            stream=bool(request.stream),
            include_usage=bool(request.stream_options and request.stream_options.include_usage),
            model=asked.model,
            asked=encode(asked).decode(),
        )

    def reply(self, asked: ModelCall, reply: Reply) -> bytes:
        """A whole `chat.completion`."""
        message: dict[str, Any] = {"role": "assistant", "content": reply.content or None, "refusal": None}
        if reply.reasoning:
            message["reasoning_content"] = reply.reasoning
        if reply.tool_calls:
            message["tool_calls"] = [_call(call) for call in reply.tool_calls]
        elif not reply.content:
            message["content"] = ""
        return encode(
            {
                "id": f"chatcmpl{reply.turn_id}",
                "object": "chat.completion",
                "created": int(time.time()),
                "model": asked.model,
                "choices": [{"index": 0, "message": message, "finish_reason": _finish(reply), "logprobs": None}],
                "usage": _usage(reply),
            }
        )

    def stream(self, asked: ModelCall, turn_id: str, prompt_tokens: int) -> ChatStream:
        return ChatStream(asked, turn_id)

    def counted(self, tokens: int) -> bytes:
        return encode({"input_tokens": tokens})

    def error(self, error: RequestRefused) -> bytes:
        return openai_error(error)


class ChatStream:
    """One streamed answer: `chat.completion.chunk` events, then [DONE]."""

    alive = COMMENT

    def __init__(self, asked: ModelCall, turn_id: str) -> None:
        self._asked = asked
        self._head = {
            "id": f"chatcmpl{turn_id}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": asked.model,
        }

    def start(self) -> bytes:
        return self._delta({"role": "assistant", "content": ""})

    def reasoning(self, delta: str) -> bytes:
        return self._delta({"reasoning_content": delta})

    def text(self, delta: str) -> bytes:
        return self._delta({"content": delta})

    def end(self, reply: Reply, shown: Shown) -> bytes:
        """What was not shown yet, tool calls whole, finish reason, usage if asked for."""
        out = self.reasoning(rest) if (rest := reply.reasoning[shown.reasoning :]) else b""
        out += self.text(rest) if (rest := reply.content[shown.content :]) else b""
        for i, call in enumerate(reply.tool_calls):
            out += self._delta({"tool_calls": [{"index": i, **_call(call)}]})
        out += self._delta({}, _finish(reply))
        if self._asked.include_usage:
            out += event({**self._head, "choices": [], "usage": _usage(reply)})
        return out + b"data: [DONE]\n\n"

    def failed(self, error: RequestRefused) -> bytes:
        return b"data: " + openai_error(error) + b"\n\n"

    def _delta(self, delta: dict[str, Any], finish: str | None = None) -> bytes:
        return event({**self._head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})


def _message(message: _Message, index: int) -> Message:
    calls: tuple[ToolCall, ...] = ()
    if message.tool_calls:
        calls = tuple(ToolCall(call.id, call.function.name, _arguments(call.function)) for call in message.tool_calls)
    return Message(
        role="system" if message.role == "developer" else message.role,
        content=_content(message, index),
        tool_calls=calls,
        tool_call_id=message.tool_call_id or "",
        name=message.name or "",
        reasoning=message.reasoning_content or message.reasoning or "",
    )


def _content(message: _Message, index: int) -> str:
    if message.content is None or isinstance(message.content, str):
        return message.content or ""
    for i, part in enumerate(message.content):
        if part.type != "text":
            raise only_text(part.type, f"messages[{index}].content[{i}]")
    return join_text((part.text for part in message.content), message.role)


def _arguments(function: _Function) -> str:
    """The arguments as JSON text; some clients send the object itself."""
    written = bytes(function.arguments)
    return decode(_text, written) if written.startswith(b'"') else as_written(function.arguments)


def _tool(tool: dict[str, Any], index: int) -> dict[str, Any]:
    function = tool.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        where = f"tools[{index}].function.name"
        raise RequestRefused(f"{where}: every tool needs a name", where)
    return function_tool(function["name"], function.get("description"), function.get("parameters"))


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _finish(reply: Reply) -> str:
    return "tool_calls" if reply.tool_calls and reply.finish_reason == "stop" else reply.finish_reason


def _usage(reply: Reply) -> dict[str, Any]:
    return {
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
        "total_tokens": reply.prompt_tokens + reply.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": reply.cached_tokens},
    }
