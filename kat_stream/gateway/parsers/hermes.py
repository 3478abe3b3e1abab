"""Hermes, Qwen2.5 and Qwen3: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number of them."""

from __future__ import annotations

import re

import msgspec

from kat_stream.gateway.parsers.base import Parsed, ToolParser, Tools


class _Call(msgspec.Struct):
    name: str
    arguments: msgspec.Raw = msgspec.Raw(b"{}")


_BLOCK = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_decoder = msgspec.json.Decoder(_Call)


def parse(text: str, _tools: Tools | None = None) -> Parsed:
    try:
        decoded = [_decoder.decode(body) for body in _BLOCK.findall(text)]
    except (msgspec.DecodeError, RecursionError):
        return text, []
    rest = _BLOCK.sub("", text)
    if not decoded or "<tool_call>" in rest or any(not bytes(call.arguments).startswith(b"{") for call in decoded):
        return text, []
    return rest.rstrip(), [(call.name, bytes(call.arguments).decode()) for call in decoded]


PARSER = ToolParser(("<tool_call>",), parse)
