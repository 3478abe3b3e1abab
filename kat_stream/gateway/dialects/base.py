"""What a dialect is: bytes of a request to the internal form, and the internal form to bytes of an answer. No I/O.

Invariant of all dialects: what cannot be served as asked (several choices, images, hosted state) is refused by name and
never served differently; fields that are not known here are ignored. Sampling parameters are the exception, by design:
the session forces its own, and what was asked is recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from kat_stream.engines.client import MAX_STOP_BYTES, MAX_STOPS
from kat_stream.errors import ContextOverflow, RequestRefused
from kat_stream.gateway.messages import ModelCall, Reply
from kat_stream.gateway.stream_text import Shown

encode = msgspec.json.Encoder().encode
COMMENT = b": keepalive\n\n"
"""A sign of life as server-sent events have it."""


class ReplyStream(Protocol):
    """One streamed answer, in the order start, (reasoning | text)*, end; `failed` instead of what is left."""

    @property
    def alive(self) -> bytes:
        """A sign of life between two events, which the clients of this wire pass over."""

    def start(self) -> bytes: ...
    def reasoning(self, delta: str) -> bytes: ...
    def text(self, delta: str) -> bytes: ...
    def end(self, reply: Reply, shown: Shown) -> bytes:
        """The rest of reasoning and content behind what was shown, tool calls, finish reason, usage."""

    def failed(self, error: RequestRefused) -> bytes: ...


class Dialect(Protocol):
    @property
    def name(self) -> str: ...

    def read(self, body: bytes, target: str) -> ModelCall:
        """`target` is the path behind the session. RequestRefused naming the field at fault."""

    def reply(self, asked: ModelCall, reply: Reply) -> bytes: ...
    def stream(self, asked: ModelCall, turn_id: str, prompt_tokens: int) -> ReplyStream: ...
    def counted(self, tokens: int) -> bytes:
        """The answer to a question for the number of tokens of a prompt."""

    def error(self, error: RequestRefused) -> bytes: ...


def decode[T](decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    """A request body as what the dialect expects; RequestRefused (400) names the field at fault."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        text, _, where = str(error).rpartition(" - at `$")
        raise RequestRefused(f"invalid request: {error}", where.strip("`.") if text else "") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestRefused(f"the request body is no valid JSON: {error}") from error


def as_written(value: msgspec.Raw) -> str:
    """A value inside a body as the JSON text that it is; RequestRefused (400) if its bytes are no text."""
    try:
        return bytes(value).decode()
    except UnicodeDecodeError as error:
        raise RequestRefused(f"the request body is no valid JSON: {error}") from error


def function_tool(name: str, description: str | None, parameters: Any) -> dict[str, Any]:
    """A tool as chat templates expect it; what else a client hangs on it (cache marks) is dropped."""
    function: dict[str, Any] = {"name": name}
    if description is not None:
        function["description"] = description
    if parameters is not None:
        function["parameters"] = parameters
    return {"type": "function", "function": function}


def only_text(kind: str, where: str) -> RequestRefused:
    """The refusal of what is no text."""
    return RequestRefused(f"{where}: the policy reads text only, not {kind!r}", where)


def positive(limit: int | None, field: str) -> int | None:
    """A limit on tokens as asked for; RequestRefused unless it is at least 1."""
    if limit is not None and limit < 1:
        raise RequestRefused(f"{field}: must be at least 1", field)
    return limit


def stop_strings(given: Sequence[str] | None, field: str) -> tuple[str, ...]:
    """The stop strings asked for; empty ones say nothing. RequestRefused for more, or longer ones, than are served."""
    stops = tuple(text for text in given or () if text)
    if len(stops) > MAX_STOPS:
        raise RequestRefused(f"{field}: at most {MAX_STOPS} stop strings, not {len(stops)}", field)
    if (longest := max((len(text.encode()) for text in stops), default=0)) > MAX_STOP_BYTES:
        raise RequestRefused(f"{field}: a stop string has at most {MAX_STOP_BYTES} bytes, not {longest}", field)
    return stops


def arguments_value(arguments: str) -> Any:
    """Arguments of a call as the object that some wires want. A policy's arguments are an object, or were no call."""
    return msgspec.json.decode(arguments)


def event(value: Any, name: str = "") -> bytes:
    """One server-sent event."""
    return (b"event: " + name.encode() + b"\n" if name else b"") + b"data: " + encode(value) + b"\n\n"


def openai_error(error: RequestRefused) -> bytes:
    """An error in OpenAI's shape and, for a full context, in OpenAI's words."""
    kind = _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    message = str(error)
    if isinstance(error, ContextOverflow):
        message = (
            f"This model's maximum context length is {error.limit} tokens. However, your messages resulted in "
            f"{error.tokens} tokens. Please reduce the length of the messages."
        )
    body = {"message": message, "type": kind, "param": error.param or None, "code": error.code or None}
    return encode({"error": body})


_TYPES = {401: "authentication_error", 404: "not_found_error", 409: "conflict_error", 429: "rate_limit_error"}
