"""Small wordings that every view shares: times, cut lines, numbers, records as plain data. Pure.

Invariant: one value a line never holds a line break or a control character, whatever a policy or a sandbox printed.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from topics import Record, VersionSpan
from topics.record import floats, ints

INT32_FIELDS = frozenset({"prompt_ids", "sampled_ids", "ids", "pos", "parent", "end", "turn_len", "index", "member"})
FLOAT32_FIELDS = frozenset({"logprobs", "advantage", "weight", "scored_logprobs", "teacher_logprobs"})
_BARS = "▁▂▃▄▅▆▇█"


END_OF_CALENDAR_MS = 253_402_300_800_000
"""The year 10000."""


def clock(timestamp_ms: int) -> str:
    """`HH:MM:SS.mmm` in UTC; dashes for a time that no calendar has: a producer's clock may say anything."""
    if not 0 <= timestamp_ms < END_OF_CALENDAR_MS:
        return "--:--:--.---"
    return datetime.fromtimestamp(timestamp_ms / 1000, UTC).strftime("%H:%M:%S.%f")[:-3]


def one_line(text: str, limit: int = 100) -> str:
    """The text on one line, control characters made visible, cut to `limit` characters with an ellipsis."""
    cut = text.strip()[: 2 * limit]
    flat = cut.replace("\r\n", "⏎").replace("\n", "⏎").replace("\t", " ")
    shown = "".join(c if c.isprintable() else "�" for c in flat)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def block(text: str, indent: str, limit_lines: int = 40) -> list[str]:
    """The text's lines, indented, control characters made visible; the middle of a long one is left out."""
    lines = ["".join(c if c.isprintable() or c == "\t" else "�" for c in line) for line in text.split("\n")]
    if lines and not lines[-1]:
        lines.pop()
    if len(lines) > limit_lines:
        half = limit_lines // 2
        lines = [*lines[:half], f"... {len(lines) - 2 * half} lines ...", *lines[-half:]]
    return [f"{indent}{line}".rstrip() for line in lines]


def number(value: float, digits: int = 3) -> str:
    """Fixed digits; `-` for NaN, which stands for unknown."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f} %"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def versions(spans: Sequence[VersionSpan]) -> str:
    """The policy versions that a turn was sampled from, in order: `a.3` or `a.3[0:12] a.4[12:40]`."""
    if len({span.version for span in spans}) <= 1:
        return spans[0].version if spans else "-"
    return " ".join(f"{span.version}[{span.start}:{span.end}]" for span in spans)


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """The last `width` values as bars between their least and greatest; NaN is a space."""
    shown = values[-width:]
    known = [v for v in shown if not math.isnan(v)]
    if not known:
        return ""
    low, span = min(known), (max(known) - min(known)) or 1.0
    return "".join(" " if math.isnan(v) else _BARS[int((v - low) / span * (len(_BARS) - 1))] for v in shown)


def readable(record: Record) -> dict[str, Any]:
    """The record as plain data for JSON: token arrays as numbers, other bytes as text or, failing that, base64."""
    plain = msgspec.to_builtins(record, builtin_types=(bytes,))
    assert isinstance(plain, dict)
    return {name: _plain(name, value) for name, value in plain.items()}


def _plain(name: str, value: Any) -> Any:
    match value:
        case bytes():
            return _bytes(name, value)
        case dict():
            return {key: _plain(str(key), inner) for key, inner in value.items()}
        case list() | tuple():
            return [_plain(name, inner) for inner in value]
    return value


def _bytes(name: str, value: bytes) -> Any:
    if name in INT32_FIELDS and len(value) % 4 == 0:
        return list(ints(value))
    if name in FLOAT32_FIELDS and len(value) % 4 == 0:
        return list(floats(value))
    try:
        return value.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(value).decode()}
