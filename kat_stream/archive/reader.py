"""Reading an archive: messages as the log would hand them out, or only the columns that a question needs.

Invariant: every message once, those of a partition in the order of their offsets; at most one row group a file of a few
is in memory (`ROW_GROUP_BYTES` of values each). A file that is merged away under a reader is read to its end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import merge
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kat_stream.archive.columns import ENVELOPE, headers_of
from kat_stream.archive.parts import Part, parts
from kat_stream.log.base import Delivered, Position
from topics import CATALOGUE, topic_named

RETRIES = 5
"""Listings that a merge may outrun before a missing file is an error."""
_KEPT = [name for name in ENVELOPE.names if name not in ("traceparent", "record")]
"""Both are headers, too."""


@dataclass(frozen=True, slots=True)
class GroupFilter:
    """Only records of this group, all of which lie in one partition of a group topic."""

    group_id: str


@dataclass(frozen=True, slots=True)
class _Open:
    part: Part
    file: pq.ParquetFile


def read_archive(
    directory: Path, topics: Sequence[str] | None = None, only: GroupFilter | None = None
) -> Iterator[Delivered]:
    """Every archived message once, topics in pipeline order; of one topic by log, then each partition in order.

    `only`: of topics whose records have a group those of one group; of other topics all. DataError for a file that is
    no archive.
    """
    for topic in topics if topics is not None else [topic.name for topic in CATALOGUE]:
        wanted = only if topic_named(topic).partition_by == "group_id" else None
        for overlapping in _sequences(_opened(directory, topic)):
            yield from _once(merge(*(_messages(one, wanted) for one in overlapping), key=_place))


def read_rows(directory: Path, topic: str, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of a topic with only these columns (`a.b` for a field of a struct), and `run` from the folder's name.

    The same row may come twice where files overlap; rows of different files come in no order.
    """
    for one in _opened(directory, topic):
        run = one.part.run
        there = [name for name in columns if name.partition(".")[0] in one.file.schema_arrow.names]
        for number in range(one.file.num_row_groups):
            for row in one.file.read_row_group(number, columns=there).to_pylist():
                yield {"run": run, **row}


def _opened(directory: Path, topic: str) -> list[_Open]:
    """All files of a topic, open: what is removed from now on can still be read."""
    for attempt in range(RETRIES):
        try:
            return [_Open(part, pq.ParquetFile(part.path)) for part in parts(directory, topic)]
        except FileNotFoundError:
            if attempt == RETRIES - 1:
                raise
    raise AssertionError("unreachable")


def _sequences(files: Sequence[_Open]) -> Iterator[list[_Open]]:
    """The files of each log in turn; those that share flushes together, which is nearly always one alone.

    A flush whose messages are of two days has two files.
    """
    for log in dict.fromkeys(one.part.log for one in files):
        together: list[_Open] = []
        last = -1
        for one in (one for one in files if one.part.log == log):
            if together and one.part.flushes[0] > last:
                yield together
                together = []
            together.append(one)
            last = max(last, one.part.flushes[1])
        yield together


def _messages(one: _Open, only: GroupFilter | None) -> Iterator[Delivered]:
    """In order of partition and offset."""
    for number in range(one.file.num_row_groups):
        if only is None:
            yield from _delivered(one.file.read_row_group(number, columns=_KEPT, use_threads=False))
        elif _may_hold(one.file.metadata.row_group(number), only.group_id):
            wanted = pc.equal(one.file.read_row_group(number, columns=["group_id"])["group_id"], only.group_id)
            if pc.any(wanted).as_py():
                yield from _delivered(one.file.read_row_group(number, columns=_KEPT).filter(wanted))


def _may_hold(row_group: Any, group_id: str) -> bool:
    """By the statistics that a file has of each row group."""
    columns = (row_group.column(number) for number in range(row_group.num_columns))
    statistics = next(column.statistics for column in columns if column.path_in_schema == "group_id")
    if statistics is None or not statistics.has_min_max:
        return statistics is None or statistics.null_count < row_group.num_rows
    return bool(statistics.min <= group_id <= statistics.max)


def _delivered(table: pa.Table) -> Iterator[Delivered]:
    table = table.set_column(
        table.schema.get_field_index("timestamp"), "timestamp", table["timestamp"].cast(pa.int64())
    )
    for topic, partition, offset, timestamp_ms, key, headers, value in zip(
        *(table[name].to_pylist() for name in _KEPT), strict=True
    ):
        yield Delivered(Position(topic, partition, offset), key, value, headers_of(headers), timestamp_ms)


def _once(messages: Iterable[Delivered]) -> Iterator[Delivered]:
    """Without the repetitions, which are neighbours."""
    before: Position | None = None
    for message in messages:
        if message.position != before:
            before = message.position
            yield message


def _place(message: Delivered) -> Position:
    return message.position
