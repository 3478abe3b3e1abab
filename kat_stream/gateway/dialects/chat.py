"""OpenAI chat completions: request, reply, stream and errors. Wire facts: research/routing_streaming.md D1.

Invariant: what cannot be served as asked (several choices, images) is refused by name; it is never served differently.
Sampling parameters are the exception, by design: the session forces its own, and what was asked is recorded.
"""

from __future__ import annotations

import time
from typing import Any, Literal

import msgspec

from kat_stream.errors import RequestRefused
from kat_stream.gateway.messages import Message, ModelCall, Reply, ToolCall

_encode = msgspec.json.Encoder().encode
_TYPES = {401: "authentication_error", 404: "not_found_error", 409: "conflict_error", 429: "rate_limit_error"}


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


class _StreamOptions(msgspec.Struct):
    include_usage: bool = False


class _Asked(msgspec.Struct, omit_defaults=True):
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


class _Body(msgspec.Struct):
    messages: list[_Message]
    tools: list[dict[str, Any]] | None = None
    stream: bool | None = False
    stream_options: _StreamOptions | None = None


_body = msgspec.json.Decoder(_Body)
_asked = msgspec.json.Decoder(_Asked)


class ChatCompletions:
    """Dialect `chat`."""

    name = "chat"

    def read(self, body: bytes) -> ModelCall:
        """A request body as a model call; RequestRefused (400) names the field."""
        try:
            request, asked = _body.decode(body), _asked.decode(body)
        except msgspec.ValidationError as error:
            text, _, where = str(error).rpartition(" - at `$")
            raise RequestRefused(f"invalid request: {error}", where.strip("`.") if text else "") from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise RequestRefused(f"the request body is no valid JSON: {error}") from error
        if not request.messages:
            raise RequestRefused("messages: at least one message is needed", "messages")
        if asked.n not in (None, 1):
            raise RequestRefused("n: only one choice a request; send several requests", "n")
        limit = asked.max_completion_tokens if asked.max_completion_tokens is not None else asked.max_tokens
        if limit is not None and limit < 1:
            raise RequestRefused("max_tokens: must be at least 1", "max_tokens")
        _check_tools(request.tools)
        stop = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
        return ModelCall(
            dialect=self.name,
            messages=tuple(_message(message, i) for i, message in enumerate(request.messages)),
            tools=request.tools or None,
            tools_allowed=bool(request.tools) and asked.tool_choice != "none",
            max_tokens=limit,
            stop=tuple(text for text in stop if text),
            stream=bool(request.stream),
            include_usage=bool(request.stream_options and request.stream_options.include_usage),
            model=asked.model,
            asked=_encode(asked).decode(),
        )

    def reply(self, asked: ModelCall, reply: Reply) -> bytes:
        """A whole `chat.completion`."""
        message: dict[str, Any] = {"role": "assistant", "content": reply.content or None, "refusal": None}
        if reply.tool_calls:
            message["tool_calls"] = [_call(call) for call in reply.tool_calls]
        elif not reply.content:
            message["content"] = ""
        return _encode(
            {
                "id": f"chatcmpl{reply.turn_id}",
                "object": "chat.completion",
                "created": int(time.time()),
                "model": asked.model,
                "choices": [{"index": 0, "message": message, "finish_reason": _finish(reply), "logprobs": None}],
                "usage": _usage(reply),
            }
        )

    def stream(self, asked: ModelCall, turn_id: str) -> ChatStream:
        return ChatStream(asked, turn_id)

    def error(self, error: RequestRefused) -> bytes:
        """An error in OpenAI's shape."""
        kind = _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
        body = {"message": str(error), "type": kind, "param": error.param or None, "code": error.code or None}
        return _encode({"error": body})

    def models(self, name: str) -> bytes:
        """The list of the one model there is."""
        model = {"id": name, "object": "model", "created": 0, "owned_by": "kat-stream"}
        return _encode({"object": "list", "data": [model]})


class ChatStream:
    """One streamed answer: `chat.completion.chunk` events, then [DONE]."""

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

    def text(self, delta: str) -> bytes:
        return self._delta({"content": delta})

    def end(self, reply: Reply, shown: int) -> bytes:
        """What was not shown yet, tool calls whole, finish reason, usage if asked for."""
        out = self.text(reply.content[shown:]) if len(reply.content) > shown else b""
        for i, call in enumerate(reply.tool_calls):
            out += self._delta({"tool_calls": [{"index": i, **_call(call)}]})
        out += self._delta({}, _finish(reply))
        if self._asked.include_usage:
            out += _event({**self._head, "choices": [], "usage": _usage(reply)})
        return out + b"data: [DONE]\n\n"

    def failed(self, error: RequestRefused) -> bytes:
        return b"data: " + ChatCompletions().error(error) + b"\n\n"

    def _delta(self, delta: dict[str, Any], finish: str | None = None) -> bytes:
        return _event({**self._head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + _encode(value) + b"\n\n"


def _message(message: _Message, index: int) -> Message:
    calls = tuple(ToolCall(call.id, call.function.name, _arguments(call.function)) for call in message.tool_calls or ())
    return Message(
        role="system" if message.role == "developer" else message.role,
        content=_content(message.content, index),
        tool_calls=calls,
        tool_call_id=message.tool_call_id or "",
        name=message.name or "",
        reasoning=message.reasoning_content or "",
    )


def _content(content: str | list[_Part] | None, index: int) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    for i, part in enumerate(content):
        if part.type != "text":
            where = f"messages[{index}].content[{i}]"
            raise RequestRefused(f"{where}: the policy reads text only, not {part.type!r}", where)
    return "".join(part.text for part in content)


def _arguments(function: _Function) -> str:
    """The arguments as JSON text; some clients send the object itself."""
    value = msgspec.json.decode(function.arguments)
    return value if isinstance(value, str) else bytes(function.arguments).decode()


def _check_tools(tools: list[dict[str, Any]] | None) -> None:
    for i, tool in enumerate(tools or ()):
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RequestRefused(f"tools[{i}].function.name: every tool needs a name", f"tools[{i}].function.name")


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
