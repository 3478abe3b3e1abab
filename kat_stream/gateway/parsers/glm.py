"""GLM-4.5 and later: `<tool_call>NAME<arg_key>k</arg_key><arg_value>v</arg_value>...</tool_call>`."""

from __future__ import annotations

import re

from kat_stream.gateway.parsers.base import Calls, Parsed, ToolParser, Tools, Written, blocks, by_schema, listed

_NAME = re.compile(r"\s*([^\s<]+)")
_ARGUMENT = re.compile(r"\s*<arg_key>([^<]*)</arg_key>\s*<arg_value>")


def parse(text: str, tools: Tools | None = None) -> Parsed:
    bodies, rest = blocks(text, "<tool_call>", "</tool_call>")
    calls: Calls = []
    for body in bodies:
        named = _NAME.match(body)
        arguments = listed(body[named.end() :], _ARGUMENT, "</arg_value>") if named is not None else None
        if named is None or arguments is None:
            return text, []
        name = named.group(1)
        calls.append(Written(name, by_schema(name, [(key.strip(), value) for key, value in arguments], tools)))
    if not calls or "<tool_call>" in rest:
        return text, []
    return rest.rstrip(), calls


PARSER = ToolParser(("<tool_call>",), parse)
