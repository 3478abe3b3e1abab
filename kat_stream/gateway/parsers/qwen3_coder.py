"""Qwen3-Coder, Qwen3.5, Nemotron 3: `<tool_call><function=NAME><parameter=KEY>value</parameter></function>`."""

from __future__ import annotations

import re

from kat_stream.gateway.parsers.base import Calls, Parsed, ToolParser, Tools, Written, by_schema, listed

_OPENING = re.compile(r"<tool_call>\s*<function=([^>\n]+)>")
# Not the first `</tool_call>`: a value may hold one.
_CLOSING = re.compile(r"</function>\s*</tool_call>")
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>")


def parse(text: str, tools: Tools | None = None) -> Parsed:
    calls: Calls = []
    rest, at = "", 0
    while (begin := text.find("<tool_call>", at)) >= 0:
        opened = _OPENING.match(text, begin)
        closed = _CLOSING.search(text, opened.end()) if opened is not None else None
        if opened is None or closed is None:
            return text, []
        given = listed(text[opened.end() : closed.start()], _PARAMETER, "</parameter>")
        if given is None:
            return text, []
        calls.append(_call(opened.group(1), given, tools))
        rest, at = rest + text[at:begin], closed.end()
    rest += text[at:]
    if not calls or "<tool_call>" in rest:
        return text, []
    return rest.rstrip(), calls


def _call(name: str, given: list[tuple[str, str]], tools: Tools | None) -> Written:
    """The template puts one line break before and after a value; what else surrounds it is the value's own."""
    values = [(key, value.removeprefix("\n").removesuffix("\n")) for key, value in given]
    return Written(name, by_schema(name, values, tools))


PARSER = ToolParser(("<tool_call>",), parse)
