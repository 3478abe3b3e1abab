"""DeepSeek V3, R1 and V3.1: a section of calls between DeepSeek's own special tokens.

V3 and R1 write `function<sep>NAME\\n```json\\n{...}\\n``` `, V3.1 writes `NAME<sep>{...}`.
"""

from __future__ import annotations

import re

from kat_stream.gateway.parsers.base import Written, sectioned

_OPENING = re.compile(r"\s*<｜tool▁call▁begin｜>(.*?)<｜tool▁sep｜>", re.DOTALL)
_FENCED = re.compile(r"([^\n]+)\n```json\n(.*?)\n```\s*", re.DOTALL)


def _read(head: str, tail: str) -> Written | None:
    fenced = _FENCED.fullmatch(tail) if head.strip() == "function" else None
    name, arguments = fenced.groups() if fenced else (head, tail)
    return Written(name.strip(), arguments) if name.strip() else None


PARSER = sectioned("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", _OPENING, "<｜tool▁call▁end｜>", _read)
