"""What every record shares: a run, a tag with name and version, and one way to and from bytes.

Invariant: `decode(type(r), encode(r)) == r`, and bytes written by any shipped version decode for ever.
Token arrays are little-endian bytes (int32 ids, float32 log-probs), as every machine that we run on has them in memory:
helpers here turn them into sequences.
"""

from __future__ import annotations

from array import array
from functools import cache

import msgspec


class Record(msgspec.Struct, frozen=True, kw_only=True, tag_field="record"):
    """Base of every record on a topic; subclasses set `tag="Name/version"`."""

    run: str


_encoder = msgspec.msgpack.Encoder()


def encode(record: Record) -> bytes:
    """The record as a msgpack map."""
    return _encoder.encode(record)


@cache
def _decoder(kind: type[Record]) -> msgspec.msgpack.Decoder[Record]:
    return msgspec.msgpack.Decoder(kind)


def decode[R: Record](kind: type[R], data: bytes) -> R:
    """Bytes back to a record of exactly this kind; `msgspec.DecodeError` or `ValidationError` names the field."""
    return _decoder(kind).decode(data)  # type: ignore[return-value]


@cache
def _kinds() -> dict[str, type[Record]]:
    return {header_of(kind): kind for kind in Record.__subclasses__()}


def decode_any(header: str, data: bytes) -> Record:
    """Bytes to the record that the header names; `KeyError` for a name or version this build does not know."""
    return _decoder(_kinds()[header]).decode(data)


def header_of(kind: type[Record]) -> str:
    """`Name/version`, the value of the `record` header: a reader can filter without decoding."""
    tag = kind.__struct_config__.tag
    if not isinstance(tag, str):
        raise TypeError(f"{kind.__name__} has no tag")
    return tag


def ints(data: bytes) -> array[int]:
    """Little-endian int32 bytes as a sequence of token ids."""
    return array("i", data)


def floats(data: bytes) -> array[float]:
    """Little-endian float32 bytes as a sequence."""
    return array("f", data)


def pack_ints(values: list[int] | array[int]) -> bytes:
    """Token ids as little-endian int32 bytes."""
    return array("i", values).tobytes()


def pack_floats(values: list[float] | array[float]) -> bytes:
    """Numbers as little-endian float32 bytes."""
    return array("f", values).tobytes()
