"""Kimi K2: `<|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>{...}<|tool_call_end|>` in a section.

What stands before the arguments is the id of the call, by which the template names it again.
"""

from __future__ import annotations

import re

from kat_stream.gateway.parsers.base import Written, sectioned

_OPENING = re.compile(r"\s*<\|tool_call_begin\|>(.*?)<\|tool_call_argument_begin\|>", re.DOTALL)
_ID = re.compile(r"(?:functions\.)?(.+):\d+")


def _read(head: str, tail: str) -> Written | None:
    named = _ID.fullmatch(head.strip())
    return Written(named.group(1), tail, said=head.strip()) if named else None


PARSER = sectioned("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", _OPENING, "<|tool_call_end|>", _read)
