"""Dead letters in words, and which of them a command line means. Pure but for the clock behind `--since`."""

from __future__ import annotations

import time

import msgspec

from kat_stream.errors import DecodeError
from kat_stream.log.dead_letters import Letter, Wanted
from kat_stream.observe.text import clock, one_line, readable

HEAD = 64
"""Bytes of the value that are shown as they are."""


def wanted(stage: str, error: str, since_s: float | None) -> Wanted:
    """Whether a letter is meant; empty strings and None mean all. `since_s`: how old it may be."""
    oldest_ms = 0.0 if since_s is None else (time.time() - since_s) * 1000

    def fits(letter: Letter) -> bool:
        record = letter.record
        by_name = stage in ("", record.stage) and error in ("", record.error_type)
        return by_name and letter.timestamp_ms >= oldest_ms

    return fits


def summary(letter: Letter) -> str:
    record = letter.record
    source = f"{record.topic} {record.partition}/{record.offset}"
    return f"{letter.number}  {source}  {record.stage}: {record.error_type}: {one_line(record.message, 80)}"


def told(letter: Letter) -> str:
    """Everything that is known of one letter."""
    record = letter.record
    return "\n".join(
        [
            f"letter {letter.number}, {clock(letter.timestamp_ms)}{', was put back' if letter.replayed else ''}",
            f"from      {record.topic} {record.partition}/{record.offset}",
            f"stage     {record.stage}",
            f"reason    {record.error_type}: {record.message}",
            f"key       {record.key.decode(errors='replace')}",
            *(f"header    {name}: {value.decode(errors='replace')}" for name, value in record.headers),
            *([] if record.left_out else _contents(letter)),
        ]
    )


def _contents(letter: Letter) -> list[str]:
    value = letter.record.value
    head = f"bytes     {len(value)}: {value[:HEAD].hex(' ')}{' ...' if value[HEAD:] else ''}"
    return [head, f"record    {_decoded(letter)}"]


def _decoded(letter: Letter) -> str:
    """The record; failing that, the plain msgpack; failing that, why not."""
    original = letter.original()
    try:
        return msgspec.json.encode(readable(original.record())).decode()
    except DecodeError as error:
        why = str(error)
    try:
        plain = msgspec.msgpack.decode(original.value)
    except msgspec.DecodeError:
        return why
    return f"{why}; as plain msgpack: {plain!r}"
