"""GLM-4.5 and later: `<tool_call>NAME<arg_key>k</arg_key><arg_value>v</arg_value>...</tool_call>`."""

from __future__ import annotations

import re

from kat_stream.gateway.parsers.base import Calls, Parsed, ToolParser, Tools, by_schema

_BLOCK = re.compile(r"<tool_call>\s*([^\s<]+)\s*(.*?)\s*</tool_call>", re.DOTALL)
_ARGUMENT = re.compile(r"<arg_key>([^<]*)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)


def parse(text: str, tools: Tools | None = None) -> Parsed:
    calls: Calls = []
    for match in _BLOCK.finditer(text):
        name, body = match.group(1), match.group(2)
        if _ARGUMENT.sub("", body).strip():
            return text, []
        calls.append((name, by_schema(name, [(k.strip(), v) for k, v in _ARGUMENT.findall(body)], tools)))
    rest = _BLOCK.sub("", text)
    if not calls or "<tool_call>" in rest:
        return text, []
    return rest.rstrip(), calls


PARSER = ToolParser(("<tool_call>",), parse)
