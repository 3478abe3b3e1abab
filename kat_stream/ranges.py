"""What numbers and addresses a setting may be, as types that msgspec checks, and how a number outside is refused.

Invariant: a number that no part of the system can work with is refused when the configuration is read. Where 0 means
something (none, chosen at start) the type allows it and the setting says what.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from msgspec import Meta

Count = Annotated[int, Meta(ge=1)]
CountOrNone = Annotated[int, Meta(ge=0)]
Partitions = Annotated[int, Meta(ge=1, le=1000)]
"""Of one topic. Eleven topics have so many, in three copies: 33,000 at the most, as many as a large cluster carries."""
Context = Annotated[int, Meta(ge=2)]
"""Tokens: one to read, one to say."""
LAST_PORT = 65_535
Port = Annotated[int, Meta(ge=0, le=LAST_PORT)]
Positive = Annotated[float, Meta(gt=0)]
PositiveOrZero = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
Url = Annotated[str, Meta(pattern="^https?://[^/]")]

_BOUND = re.compile(r"Expected `\w+` (>=|<=|>) (\S+) - at `\$\.(.+)`")
_WORDS = {">=": "at least", "<=": "at most", ">": "more than"}


def refusal(message: str, table: Any) -> str | None:
    """`key is value, expected at least 1`, from what msgspec says of `table`; None if it says something else."""
    found = _BOUND.fullmatch(message)
    if found is None:
        return None
    sign, bound, key = found.groups()
    value = table
    for name, index in re.findall(r"(\w+)|\[(\d+)\]", key):
        value = value[int(index) if index else name]
    return f"{key} is {value}, expected {_WORDS[sign]} {bound.removesuffix('.0')}"
