"""Qwen3-Coder, Qwen3.5, Nemotron 3: `<tool_call><function=NAME><parameter=KEY>value</parameter></function>`."""

from __future__ import annotations

import re

from kat_stream.gateway.parsers.base import Calls, Parsed, ToolParser, Tools, by_schema

_BLOCK = re.compile(r"<tool_call>\s*<function=([^>\n]+)>(.*?)</function>\s*</tool_call>", re.DOTALL)
# The template puts one line break before and after a value; what else surrounds it is the value's own.
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


def parse(text: str, tools: Tools | None = None) -> Parsed:
    calls: Calls = []
    for match in _BLOCK.finditer(text):
        name, body = match.group(1), match.group(2)
        if _PARAMETER.sub("", body).strip():
            return text, []
        calls.append((name, by_schema(name, _PARAMETER.findall(body), tools)))
    rest = _BLOCK.sub("", text)
    if not calls or "<tool_call>" in rest:
        return text, []
    return rest.rstrip(), calls


PARSER = ToolParser(("<tool_call>",), parse)
