"""Tool calls in the policy's text: a registry of parsers, one a way of writing them.

Invariant: a text that does not parse stays text, to the last character; nothing the policy wrote is repaired.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from kat_stream.errors import ConfigError
from kat_stream.gateway.messages import ToolCall

Parsed = tuple[str, list[tuple[str, str]]]
"""Visible content, and (name, arguments as JSON text) of each call."""


@dataclass(frozen=True, slots=True)
class ToolParser:
    """How one family of models writes tool calls. `opening` starts a call: from there on a stream holds text back."""

    opening: str
    parse: Callable[[str], Parsed]


class _HermesCall(msgspec.Struct):
    name: str
    arguments: msgspec.Raw = msgspec.Raw(b"{}")


_HERMES = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_hermes_decoder = msgspec.json.Decoder(_HermesCall)


def _hermes(text: str) -> Parsed:
    """Hermes and Qwen: <tool_call>{"name": ..., "arguments": {...}}</tool_call>, any number of them."""
    try:
        decoded = [_hermes_decoder.decode(body) for body in _HERMES.findall(text)]
    except msgspec.DecodeError:
        return text, []
    rest = _HERMES.sub("", text)
    if not decoded or "<tool_call>" in rest or any(not bytes(call.arguments).startswith(b"{") for call in decoded):
        return text, []
    return rest.rstrip(), [(call.name, bytes(call.arguments).decode()) for call in decoded]


def _none(text: str) -> Parsed:
    return text, []


PARSERS: dict[str, ToolParser] = {"none": ToolParser("", _none), "hermes": ToolParser("<tool_call>", _hermes)}


def get_parser(name: str) -> ToolParser:
    """The parser of this name; ConfigError names those there are."""
    if name not in PARSERS:
        raise ConfigError(f"gateway.tools: no parser {name!r}; there are: {', '.join(sorted(PARSERS))}")
    return PARSERS[name]


def read_reply(parser: ToolParser, text: str, turn_id: str) -> tuple[str, tuple[ToolCall, ...]]:
    """Content and calls of a reply. Ids follow from the turn; letters and digits only, as agents rewrite others."""
    content, calls = parser.parse(text)
    return content, tuple(ToolCall(f"call{turn_id[:20]}{i}", name, args) for i, (name, args) in enumerate(calls))
