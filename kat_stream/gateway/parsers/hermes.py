"""Hermes, Qwen2.5 and Qwen3: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number of them."""

from __future__ import annotations

import msgspec

from kat_stream.gateway.parsers.base import Parsed, ToolParser, Tools, Written, blocks, is_object


class _Call(msgspec.Struct):
    name: str
    arguments: msgspec.Raw = msgspec.Raw(b"{}")


_decoder = msgspec.json.Decoder(_Call)


def parse(text: str, _tools: Tools | None = None) -> Parsed:
    bodies, rest = blocks(text, "<tool_call>", "</tool_call>")
    try:
        decoded = [_decoder.decode(body.strip()) for body in bodies]
    except (msgspec.DecodeError, RecursionError):
        return text, []
    calls = [Written(call.name, bytes(call.arguments).decode()) for call in decoded]
    if not calls or "<tool_call>" in rest or not all(is_object(call.arguments) for call in calls):
        return text, []
    return rest.rstrip(), calls


PARSER = ToolParser(("<tool_call>",), parse)
