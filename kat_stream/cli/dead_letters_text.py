"""Dead letters in words, and which of them a command line means. Pure but for the clock behind `--since`."""

from __future__ import annotations

import time

import msgspec

from kat_stream.errors import ConfigError, DecodeError
from kat_stream.log.dead_letters import Letter, Wanted
from kat_stream.observe.text import clock, one_line, readable

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
HEAD = 64
"""Bytes of the value that are shown as they are."""


def seconds(age: str) -> float:
    """`30m` as seconds; ConfigError for anything else."""
    number, unit = age[:-1], age[-1:]
    if unit not in UNITS or not number.isdigit():
        raise ConfigError(f"--since {age}: expected a number and s, m, h or d, for example --since 2h")
    return int(number) * UNITS[unit]


def wanted(stage: str, error: str, since: str) -> Wanted:
    """Whether a letter is meant; empty strings mean all."""
    oldest_ms = (time.time() - seconds(since)) * 1000 if since else 0.0

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
