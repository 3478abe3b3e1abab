"""Wire formats that agents speak, one a file, behind one protocol; and which path is which."""

from __future__ import annotations

from typing import Literal, NamedTuple

from kat_stream.gateway.dialects.anthropic import AnthropicMessages
from kat_stream.gateway.dialects.base import Dialect, ReplyStream, encode
from kat_stream.gateway.dialects.chat import ChatCompletions
from kat_stream.gateway.dialects.google import GenerateContent
from kat_stream.gateway.dialects.responses import Responses

__all__ = ["CHAT", "ChatCompletions", "Dialect", "ReplyStream", "Route", "listing", "route"]

CHAT: Dialect = ChatCompletions()
_MESSAGES: Dialect = AnthropicMessages()
_RESPONSES: Dialect = Responses()
_GOOGLE: Dialect = GenerateContent()
Action = Literal["call", "count", "models"]


class Route(NamedTuple):
    """What a path of a session asks for, and in whose words."""

    dialect: Dialect
    action: Action


_ROUTES = {
    ("POST", "v1/chat/completions"): Route(CHAT, "call"),
    ("POST", "v1/responses"): Route(_RESPONSES, "call"),
    ("POST", "v1/responses/input_tokens"): Route(_RESPONSES, "count"),
    ("POST", "v1/messages"): Route(_MESSAGES, "call"),
    ("POST", "v1/messages/count_tokens"): Route(_MESSAGES, "count"),
    ("GET", "v1/models"): Route(CHAT, "models"),
    ("GET", "v1beta/models"): Route(_GOOGLE, "models"),
}
_GOOGLE_ACTIONS: dict[str, Action] = {
    "generateContent": "call",
    "streamGenerateContent": "call",
    "countTokens": "count",
}


def route(method: str, path: str) -> Route | None:
    """The route of a path behind the session; None if there is none. Google's paths hold the model's name."""
    if path.startswith(("v1beta/models/", "v1/models/")) and method == "POST":
        action = _GOOGLE_ACTIONS.get(path.rpartition(":")[2])
        return Route(_GOOGLE, action) if action else None
    return _ROUTES.get((method, path))


def spoken_at(path: str) -> Dialect:
    """Whose words an error at this path has, known route or not."""
    for start, dialect in (("v1/messages", _MESSAGES), ("v1beta/", _GOOGLE), ("v1/models/", _GOOGLE)):
        if path.startswith(start):
            return dialect
    return CHAT


def listing(names: tuple[str, ...]) -> bytes:
    """The models there are; one answer serves the clients of all, some of which ask at the same path."""
    data = [
        {
            "id": name,
            "object": "model",
            "type": "model",
            "created": 0,
            "created_at": "1970-01-01T00:00:00Z",
            "display_name": name,
            "owned_by": "kat-stream",
        }
        for name in names
    ]
    page = {"has_more": False, "first_id": names[0], "last_id": names[-1]}
    methods = ["generateContent", "countTokens"]
    google = [{"name": f"models/{name}", "supportedGenerationMethods": methods} for name in names]
    return encode({"object": "list", "data": data, "models": google} | page)
