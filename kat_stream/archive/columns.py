"""Records as Arrow columns, derived from the records' own definitions. Pure: no files here.

Each field is a column of its type: token arrays lists of int32 or float32, nested structs Arrow structs, tuples lists,
dicts lists of (key, value). In front of them stand the envelope's columns, which every topic has; `value` is the
message as it was, so that nothing depends on this module to be exact. Invariant: every message gives one row; one that
is no record of its topic has nulls in the record's columns, and a field with a number beyond 64 bits is null. `run` is
no column: it is the folder's name.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
import pyarrow as pa

from kat_stream.errors import DecodeError
from kat_stream.log.base import Delivered
from kat_stream.observe.text import FLOAT32_FIELDS, INT32_FIELDS
from topics import Record, topic_named

ENVELOPE = pa.schema(
    [
        ("topic", pa.string()),
        ("partition", pa.int32()),
        ("offset", pa.int64()),
        ("timestamp", pa.timestamp("ms", tz="UTC")),
        ("key", pa.binary()),
        ("headers", pa.list_(pa.struct([("key", pa.string()), ("value", pa.binary())]))),
        ("traceparent", pa.string()),
        ("record", pa.string()),
        ("value", pa.binary()),
    ]
)
_SCALARS: dict[object, pa.DataType] = {
    str: pa.string(),
    bool: pa.bool_(),
    int: pa.int64(),
    float: pa.float64(),
    bytes: pa.binary(),
}
Values = Sequence[Any]


@dataclass(frozen=True, slots=True)
class Column:
    """An Arrow type and how values (None where there is none) become an array of it."""

    type: pa.DataType
    build: Callable[[Values], pa.Array]


def table_of(messages: Sequence[Delivered]) -> pa.Table:
    """The messages of one topic, a row each, in the order given."""
    topic = topic_named(messages[0].position.topic)
    records = [_record(message, topic.record) for message in messages]
    arrays = [pa.array(values, kind.type) for values, kind in zip(_envelope(messages), ENVELOPE, strict=True)]
    names = list(ENVELOPE.names)
    for name, (field, column) in record_columns(topic.record).items():
        arrays.append(_array(column, _fields(records, field)))
        names.append(name)
    return pa.table(arrays, names=names)


@cache
def record_columns(kind: type[Record]) -> Mapping[str, tuple[str, Column]]:
    """Column name -> (field, column). A field that is called like an envelope's column is `record_<field>`."""
    columns = {}
    for field, hint in _hints(kind).items():
        if field != "run":
            columns[f"record_{field}" if field in ENVELOPE.names else field] = (field, _column(hint, field))
    return columns


def headers_of(pairs: Iterable[Mapping[str, Any]]) -> dict[str, bytes]:
    """The column `headers` back as a mapping."""
    return {pair["key"]: pair["value"] for pair in pairs}


def _array(column: Column, values: Values) -> pa.Array:
    """msgpack has unsigned integers of 64 bits, which no column holds: what has one is null."""
    try:
        return column.build(values)
    except OverflowError:
        return column.build([value if _fits(column, value) else None for value in values])


def _fits(column: Column, value: Any) -> bool:
    try:
        column.build([value])
    except OverflowError:
        return False
    return True


def _record(message: Delivered, kind: type[Record]) -> Record | None:
    try:
        record = message.record()
    except DecodeError:
        return None
    return record if isinstance(record, kind) else None


def _envelope(messages: Sequence[Delivered]) -> Iterable[Values]:
    """In the order of ENVELOPE."""
    yield [message.position.topic for message in messages]
    yield [message.position.partition for message in messages]
    yield [message.position.offset for message in messages]
    yield [message.timestamp_ms for message in messages]
    yield [message.key for message in messages]
    yield [[{"key": k, "value": v} for k, v in message.headers.items()] for message in messages]
    yield [_text(message.headers.get("traceparent")) for message in messages]
    yield [_text(message.headers.get("record")) for message in messages]
    yield [message.value for message in messages]


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode(errors="replace")


def _hints(kind: type[msgspec.Struct]) -> Mapping[str, Any]:
    hints = get_type_hints(kind)
    return {name: hints[name] for name in kind.__struct_fields__}


def _column(hint: Any, field: str) -> Column:
    """TypeError for a type that has no column: a record that cannot be archived must not ship."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is bytes and field in INT32_FIELDS:
        return _numbers(pa.int32())
    if hint is bytes and field in FLOAT32_FIELDS:
        return _numbers(pa.float32())
    if hint in _SCALARS:
        return Column(_SCALARS[hint], partial(pa.array, type=_SCALARS[hint]))
    if origin is Literal:
        return _column(type(arguments[0]), field)
    if origin in (Union, types.UnionType) and len(arguments) == 2 and arguments[1] is type(None):
        return _column(arguments[0], field)
    if origin in (tuple, list) and len(set(arguments) - {...}) == 1:
        return _list(_column(arguments[0], field))
    if origin is tuple:
        return _struct({f"f{i}": (_item(i), _column(inner, field)) for i, inner in enumerate(arguments)})
    if origin is dict:
        pair = {"key": (_item(0), _column(str, "")), "value": (_item(1), _column(arguments[1], ""))}
        return _list(_struct(pair), items=lambda value: value.items())
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        inner = {name: (_attribute(name), _column(one, name)) for name, one in _hints(hint).items()}
        return _struct(inner)
    raise TypeError(f"{field}: no column for {hint}")


def _attribute(name: str) -> Callable[[Any], Any]:
    return lambda value: getattr(value, name)


def _item(place: int) -> Callable[[Any], Any]:
    return lambda value: value[place]


def _fields(values: Values, name: str) -> Values:
    return [None if value is None else getattr(value, name) for value in values]


def _struct(inner: Mapping[str, tuple[Callable[[Any], Any], Column]]) -> Column:
    fields = [pa.field(name, column.type) for name, (_, column) in inner.items()]

    def build(values: Values) -> pa.Array:
        arrays = [
            column.build([None if value is None else get(value) for value in values]) for get, column in inner.values()
        ]
        return pa.StructArray.from_arrays(arrays, fields=fields, mask=_missing(values))

    return Column(pa.struct(fields), build)


def _list(inner: Column, items: Callable[[Any], Iterable[Any]] = iter) -> Column:
    def build(values: Values) -> pa.Array:
        flat = [item for value in values if value is not None for item in items(value)]
        return _lists([0 if value is None else len(value) for value in values], inner.build(flat), _missing(values))

    return Column(pa.list_(inner.type), build)


def _numbers(kind: pa.DataType) -> Column:
    """Little-endian bytes of four-byte numbers, taken over as they are; null where their length is no multiple."""

    def build(values: Values) -> pa.Array:
        good = [value if value is not None and len(value) % 4 == 0 else None for value in values]
        data = b"".join(value for value in good if value)
        flat = pa.Array.from_buffers(kind, len(data) // 4, [None, pa.py_buffer(data)])
        return _lists([0 if value is None else len(value) // 4 for value in good], flat, _missing(good))

    return Column(pa.list_(kind), build)


def _lists(lengths: Sequence[int], flat: pa.Array, missing: pa.Array) -> pa.Array:
    offsets = pa.array(accumulate(lengths, initial=0), pa.int32())
    return pa.ListArray.from_arrays(offsets, flat, mask=missing)


def _missing(values: Values) -> pa.Array:
    return pa.array([value is None for value in values], pa.bool_())
