"""DeepSeek V3, R1 and V3.1: a section of calls between DeepSeek's own special tokens.

V3 and R1 write `function<sep>NAME\\n```json\\n{...}\\n``` `, V3.1 writes `NAME<sep>{...}`.
"""

from __future__ import annotations

import re

from kat_stream.gateway.parsers.base import Calls, Parsed, ToolParser, Tools, is_object

_BEGIN, _END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL = re.compile("<｜tool▁call▁begin｜>(.*?)<｜tool▁sep｜>(.*?)<｜tool▁call▁end｜>", re.DOTALL)
_FENCED = re.compile(r"([^\n]+)\n```json\n(.*?)\n```\s*", re.DOTALL)


def parse(text: str, _tools: Tools | None = None) -> Parsed:
    before, begin, section = text.partition(_BEGIN)
    body, end, after = section.partition(_END)
    if not begin or not end or after.strip() or _CALL.sub("", body).strip():
        return text, []
    calls: Calls = []
    for head, tail in _CALL.findall(body):
        fenced = _FENCED.fullmatch(tail) if head.strip() == "function" else None
        name, arguments = fenced.groups() if fenced else (head, tail)
        if not name.strip() or not is_object(arguments):
            return text, []
        calls.append((name.strip(), arguments.strip()))
    return (before.rstrip(), calls) if calls else (text, [])


PARSER = ToolParser((_BEGIN,), parse)
