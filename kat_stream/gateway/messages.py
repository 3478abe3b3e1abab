"""The one internal form of a model call: what every dialect is read into and every reply is written from.

Owns canonical comparison. Invariant: two messages have the same `canonical()` bytes exactly if an agent that echoes one
for the other changed nothing that the policy said: string content equals a list of text parts, null equals "", tool
arguments are compared as JSON values (10.0 is 10, and free text that is a JSON object is that object), ids of tool
calls and reasoning are left out. Digests of these bytes are recorded: a session with a call that another version of
this program compares otherwise does not find that reply again when it moves there. Its next prompt is mounted by its
tokens alone, once, as a fork that is counted; no token is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from itertools import takewhile
from typing import Any

import msgspec

_json = msgspec.json.Encoder(order="deterministic")
_EXACT = 1 << 53
"""Up to here every integer is a float, so that an agent that knows floats alone (JavaScript) writes it as it is."""


def _number(text: str) -> float:
    """A JSON number with a point or an exponent. JavaScript writes 10.0 as 10, and -0.0 as 0."""
    value = float(text)
    if math.isinf(value):  # as msgspec refuses it itself
        raise msgspec.ValidationError("Number out of range")
    return int(value) if value.is_integer() and abs(value) <= _EXACT else value


_compared = msgspec.json.Decoder(float_hook=_number)


class ToolCall(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """One call of a tool; `arguments` is the JSON text as it was written."""

    id: str
    name: str
    arguments: str
    said: str = ""
    """The policy's own id of it, where its family writes one (Kimi); agents know the call by `id`."""

    @property
    def shown_id(self) -> str:
        """The id that the chat template gets, for the call and for its result."""
        return self.said or self.id

    def value(self) -> Any:
        """The arguments as a JSON value, or the text itself if it is no JSON."""
        try:
            return msgspec.json.decode(self.arguments)
        except (msgspec.DecodeError, RecursionError):
            return self.arguments

    def compared(self) -> Any:
        """The arguments as a value that is equal for the same call, whichever wire and agent it went through.

        A tool of free text (kat_stream.gateway.dialects.responses) that was called with other arguments than its text
        gets their JSON as its text, and comes back so.
        """
        value = _parsed(self.arguments)
        if isinstance(value, dict) and value.keys() == {"input"} and isinstance(text := value["input"], str):
            inner = _parsed(text)
            return inner if isinstance(inner, dict) else value
        return value


def _parsed(text: str) -> Any:
    try:
        return _compared.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return text


class Message(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One message of a conversation, whatever dialect it came in.

    Its parts are texts: no ring can go through it, so that the search for garbage need not walk long conversations.
    """

    role: str
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""
    reasoning: str = ""

    def canonical(self) -> bytes:
        """Bytes that are equal for messages that say the same."""
        calls = [(call.name, call.compared()) for call in self.tool_calls]
        return _json.encode((self.role, self.content, calls))

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates of Hugging Face expect it; tool arguments are values, not text."""
        out: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            out["tool_calls"] = [
                {"id": call.shown_id, "type": "function", "function": {"name": call.name, "arguments": call.value()}}
                for call in self.tool_calls
            ]
        if self.tool_call_id:
            out["tool_call_id"] = self.tool_call_id
        if self.name:
            out["name"] = self.name
        if self.reasoning:
            out["reasoning_content"] = self.reasoning
        return out


def join_text(texts: Iterable[str], role: str) -> str:
    """Text blocks as one text. An assistant's blocks are pieces of one utterance, others' stand by themselves."""
    return ("" if role == "assistant" else "\n").join(texts)


class ModelCall(msgspec.Struct, frozen=True, kw_only=True):
    """What an agent asks for."""

    dialect: str
    messages: tuple[Message, ...]
    tools: list[dict[str, Any]] | None = None
    """As chat templates expect them: {"type": "function", "function": {"name", "description", "parameters"}}."""
    tool_kinds: dict[str, str] = {}
    """Tools that the wire knows by another form than the policy, by their name here; the dialect's own words."""
    tools_allowed: bool = False
    """The reply may hold tool calls."""
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    model: str = ""
    asked: str = ""
    """Sampling parameters as asked for, as JSON: recorded, never obeyed."""
    thread: str = ""
    """The agent's own name of this thread of its work, if it gives one: sub-agents have others."""

    def system(self) -> str:
        """What stands before the first message that is no instruction."""
        leading = takewhile(lambda message: message.role == "system", self.messages)
        return "\n".join(message.content for message in leading)

    def tools_digest(self) -> bytes:
        """16 bytes that are equal for equal tool sets."""
        return blake2b(_json.encode(self.tools or []), digest_size=16).digest()


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """What the policy answered, after its turn was acknowledged by the log. Counts are tokens."""

    turn_id: str
    content: str
    reasoning: str = ""
    ill_formed: bool = False
    """The policy began a tool call that does not parse; it is in the content, as it was written."""
    tool_calls: tuple[ToolCall, ...]
    finish_reason: str
    """stop | length | abort"""
    matched_stop: str = ""
    """The stop string of the agent that ended it."""
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def message(self) -> Message:
        """The reply as an echo of it comes back in the next request."""
        return Message(role="assistant", content=self.content, tool_calls=self.tool_calls, reasoning=self.reasoning)


def chain(call: ModelCall, known: Sequence[bytes] = (b"",)) -> list[bytes]:
    """Digest of messages[:n] for n = 0..len(messages): equal digests are equal conversations.

    `known` are the first of them, from an earlier call that began with the same messages.
    """
    digests = list(known)
    for message in call.messages[len(digests) - 1 :]:
        digests.append(extend(digests[-1], message))
    return digests


def extend(digest: bytes, message: Message) -> bytes:
    """The digest of a conversation that goes on with `message`."""
    return blake2b(digest + message.canonical(), digest_size=16).digest()
