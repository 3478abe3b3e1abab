"""Reading an archive: messages as the log would hand them out, or only the columns that a question needs.

Invariant: every message once, those of a partition in the order of their offsets; only files whose flushes overlap are
open together, nearly always one alone, with one row group of each in memory (`ROW_GROUP_BYTES` of values). A file that
is merged away while it is open is read to its end; one that is gone before is found again in what it became, and a
reader goes on after the last offset that it handed out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from heapq import merge
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kat_stream.archive.columns import ENVELOPE, headers_of
from kat_stream.archive.parts import LOOKS, Part, parts, statistics
from kat_stream.errors import DataError
from kat_stream.log.base import Delivered, Position
from topics import CATALOGUE, topic_named

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
    no archive, or files that change faster than they can be read.
    """
    for topic in topics if topics is not None else [topic.name for topic in CATALOGUE]:
        yield from _once(directory, topic, only if topic_named(topic).partition_by == "group_id" else None)


def read_rows(directory: Path, topic: str, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of a topic with only these columns (`a.b` for a field of a struct), and `run` from the folder's name.

    The same row may come twice where files overlap or are merged meanwhile; rows of different files come in no order.
    DataError as `read_archive`.
    """
    read: set[Path] = set()
    for (one,) in _opened(directory, topic, lambda part: part.path not in read, _one_by_one):
        there = [name for name in columns if name.partition(".")[0] in one.file.schema_arrow.names]
        for number in range(one.file.num_row_groups):
            for row in one.file.read_row_group(number, columns=there).to_pylist():
                yield {"run": one.part.run, **row}
        read.add(one.part.path)


def _once(directory: Path, topic: str, only: GroupFilter | None) -> Iterator[Delivered]:
    after: dict[tuple[str, int], int] = {}  # (log, partition) -> the first offset that was not dealt with

    def unread(part: Part) -> bool:
        return any(end > after.get((part.log, number), 0) for number, (_, end) in part.spans.items())

    for together in _opened(directory, topic, unread, _sequences):
        log = together[0].part.log
        for message in merge(*(_messages(one, only) for one in together), key=_place):
            _, number, offset = message.position
            if offset >= after.get((log, number), 0):
                after[log, number] = offset + 1
                yield message
        for number, (_, end) in (span for one in together for span in one.part.spans.items()):
            after[log, number] = max(end, after.get((log, number), 0))


def _opened(
    directory: Path,
    topic: str,
    unread: Callable[[Part], bool],
    groups: Callable[[Sequence[Part]], Iterable[Sequence[Part]]],
) -> Iterator[list[_Open]]:
    """Group after group of the files that are unread, open for its turn. Where one is gone, all are listed again."""
    looks = 0
    while looks < LOOKS:
        looks += 1
        for files in groups([part for part in parts(directory, topic) if unread(part)]):
            with ExitStack() as stack:
                try:
                    together = [_Open(part, stack.enter_context(pq.ParquetFile(part.path))) for part in files]
                except FileNotFoundError:
                    break
                looks = 0
                yield together
        else:
            return
    raise DataError(f"{directory / topic}: its files change faster than they can be read")


def _one_by_one(files: Sequence[Part]) -> Iterable[Sequence[Part]]:
    return ([part] for part in files)


def _sequences(files: Sequence[Part]) -> Iterator[list[Part]]:
    """The files of each log in turn; those that share flushes together, which is nearly always one alone.

    A flush whose messages are of two days has two files.
    """
    for log in dict.fromkeys(part.log for part in files):
        together: list[Part] = []
        last = -1
        for part in (part for part in files if part.log == log):
            if together and part.flushes[0] > last:
                yield together
                together = []
            together.append(part)
            last = max(last, part.flushes[1])
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


def _may_hold(row_group: pq.RowGroupMetaData, group_id: str) -> bool:
    """By the statistics that a file has of each row group."""
    known = statistics(row_group, "group_id")
    if known is None or not known.has_min_max:
        return known is None or known.null_count < row_group.num_rows
    return bool(known.min <= group_id <= known.max)


def _delivered(table: pa.Table) -> Iterator[Delivered]:
    table = table.set_column(
        table.schema.get_field_index("timestamp"), "timestamp", table["timestamp"].cast(pa.int64())
    )
    for topic, partition, offset, timestamp_ms, key, headers, value in zip(
        *(table[name].to_pylist() for name in _KEPT), strict=True
    ):
        yield Delivered(Position(topic, partition, offset), key, value, headers_of(headers), timestamp_ms)


def _place(message: Delivered) -> Position:
    return message.position
