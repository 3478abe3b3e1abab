"""Llama 3.1 to 3.3: the whole reply is `{"name": ..., "parameters": {...}}`, perhaps behind `<|python_tag|>`."""

from __future__ import annotations

import msgspec

from kat_stream.gateway.parsers.base import Parsed, ToolParser, Tools, Written, is_object

_TAG = "<|python_tag|>"


class _Call(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    parameters: msgspec.Raw = msgspec.Raw(b"")
    arguments: msgspec.Raw = msgspec.Raw(b"")
    type: str = "function"


_decoder = msgspec.json.Decoder(_Call)


def parse(text: str, _tools: Tools | None = None) -> Parsed:
    try:
        call = _decoder.decode(text.strip().removeprefix(_TAG).strip())
    except (msgspec.DecodeError, RecursionError):
        return text, []
    arguments = bytes(call.parameters or call.arguments or b"{}").decode()
    return ("", [Written(call.name, arguments)]) if is_object(arguments) else (text, [])


PARSER = ToolParser(("{", _TAG), parse, only_at_start=True)
