"""Lists of messages as a template accepts them: some refuse instructions in the middle or two users in a row.

Invariant: no text is lost or moved behind another; only roles change and neighbours are joined. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

PROBES = ("ssu", "su", "uu", "usu", "uasu", "uaua")
"""Orders of roles that agents send: instructions in two messages and in the middle, users in a row."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a template needs. `one_system`: instructions at the head are one message, later ones are a user's.

    `alternate`: users in a row are one message. `text_arguments`: arguments of calls are JSON text, not values.
    """

    one_system: bool = False
    alternate: bool = False
    text_arguments: bool = False

    def fit(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages as the template takes them."""
        if self.text_arguments:
            messages = [_with_text(message) for message in messages]
        return self._joined(messages) if self.one_system else list(messages)

    def _joined(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        out: list[dict[str, Any]] = []
        head = True
        for message in messages:
            head = head and message["role"] == "system"
            if message["role"] == "system" and not head:
                message = {**message, "role": "user"}
            joined = message["role"] == "system" or (self.alternate and message["role"] == "user")
            if joined and out and out[-1]["role"] == message["role"]:
                out[-1] = {**out[-1], "content": f"{out[-1]['content']}\n\n{message['content']}"}
            else:
                out.append(message)
        return out


ROLES = (Shape(), Shape(one_system=True), Shape(one_system=True, alternate=True))
"""From the least change to the most."""


def _with_text(message: dict[str, Any]) -> dict[str, Any]:
    if "tool_calls" not in message:
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": _text(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else msgspec.json.encode(arguments).decode()
