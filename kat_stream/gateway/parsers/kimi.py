"""Kimi K2: `<|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>{...}<|tool_call_end|>` in a section."""

from __future__ import annotations

import re

from kat_stream.gateway.parsers.base import Calls, Parsed, ToolParser, Tools, is_object

_BEGIN, _END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
_CALL = re.compile(
    r"<\|tool_call_begin\|>(.*?)<\|tool_call_argument_begin\|>(.*?)<\|tool_call_end\|>",
    re.DOTALL,
)
_ID = re.compile(r"(?:functions\.)?(.+):\d+")


def parse(text: str, _tools: Tools | None = None) -> Parsed:
    before, begin, section = text.partition(_BEGIN)
    body, end, after = section.partition(_END)
    if not begin or not end or after.strip() or _CALL.sub("", body).strip():
        return text, []
    calls: Calls = []
    for head, arguments in _CALL.findall(body):
        named = _ID.fullmatch(head.strip())
        if named is None or not is_object(arguments):
            return text, []
        calls.append((named.group(1), arguments.strip()))
    return (before.rstrip(), calls) if calls else (text, [])


PARSER = ToolParser((_BEGIN,), parse)
