"""Kimi K2: `<|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>{...}<|tool_call_end|>` in a section."""

from __future__ import annotations

import re

from kat_stream.gateway.parsers.base import sectioned

_CALL = re.compile(
    r"<\|tool_call_begin\|>(.*?)<\|tool_call_argument_begin\|>(.*?)<\|tool_call_end\|>",
    re.DOTALL,
)
_ID = re.compile(r"(?:functions\.)?(.+):\d+")


def _read(head: str, tail: str) -> tuple[str, str] | None:
    named = _ID.fullmatch(head.strip())
    return (named.group(1), tail) if named else None


PARSER = sectioned("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", _CALL, _read)
