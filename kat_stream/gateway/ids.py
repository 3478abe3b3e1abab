"""Token ids in their three forms: a list, packed int32 as they are recorded, and text as an engine reads them. Pure.

A long prompt's text is made of the text of what is known and of what is new: to write 100,000 numbers takes
milliseconds. Its copies count, too: `join` makes one of all pieces, `+` one at each sign.
"""

from __future__ import annotations

from array import array

import msgspec

_encode = msgspec.json.Encoder().encode


def unpack(ids: bytes) -> list[int]:
    """int32[n] as a list."""
    return array("i", ids).tolist()


def written(ids: list[int]) -> bytes:
    """Ids as the inside of a JSON list."""
    return _encode(ids)[1:-1]


def joined(before: bytes, after: bytes) -> bytes:
    """The insides of two JSON lists as that of one."""
    return b",".join((before, after)) if before and after else before or after
