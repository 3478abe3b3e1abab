"""DeepSeek V3, R1 and V3.1: a section of calls between DeepSeek's own special tokens.

V3 and R1 write `function<sep>NAME\\n```json\\n{...}\\n``` `, V3.1 writes `NAME<sep>{...}`.
"""

from __future__ import annotations

import re

from kat_stream.gateway.parsers.base import sectioned

_CALL = re.compile("<｜tool▁call▁begin｜>(.*?)<｜tool▁sep｜>(.*?)<｜tool▁call▁end｜>", re.DOTALL)
_FENCED = re.compile(r"([^\n]+)\n```json\n(.*?)\n```\s*", re.DOTALL)


def _read(head: str, tail: str) -> tuple[str, str] | None:
    fenced = _FENCED.fullmatch(tail) if head.strip() == "function" else None
    name, arguments = fenced.groups() if fenced else (head, tail)
    return (name.strip(), arguments) if name.strip() else None


PARSER = sectioned("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", _CALL, _read)
