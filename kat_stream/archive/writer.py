"""Writing an archive: messages are collected, written in files, and small files are merged into larger ones.

Invariant: a message is archived once over any number of restarts, and after a restart nothing is read again that was
dealt with, other runs' messages included: positions change in the same commit as the files. What a file says of itself
is read once: after that a merge lists names, however many files there are.
"""

from __future__ import annotations

import os
import threading
import uuid
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kat_stream.archive.columns import table_of
from kat_stream.archive.parts import (
    Commit,
    Part,
    about,
    archived_positions,
    describe,
    described,
    finish,
    folder,
    hidden,
    in_order,
    last_flush,
    named,
    recover,
    statistics,
    write_commit,
)
from kat_stream.log.base import Delivered
from topics import CATALOGUE

ROW_GROUP_BYTES = 8 << 20
"""Of values, in one row group: what a reader holds at once."""
MERGE_AT = 8
"""So many files of one size class in a folder become one."""
SIZES = (512 << 10, 4 << 20)
"""Upper limits of the size classes in bytes of rows; larger files stay as they are. Not of files: what compresses to
nothing would be merged until no array holds a partition of it."""
MERGE_BYTES = 16 << 20
"""Of rows that a merge holds at once, as far as whole partitions allow; files may together have many times that."""
Held = tuple[Delivered, str]
"""A message and its run."""


class _Run(msgspec.Struct):
    run: str = ""


_run = msgspec.msgpack.Decoder(_Run)


class ArchiveWriter:
    """Collects delivered messages and writes them in files. `add` and `flush` may be called from two threads.

    `run`: take only this run's records and bytes that are no record; empty: all. `log_id` names the log that offsets
    belong to: constant for a Kafka cluster, fresh for each in-memory log. One writer a directory: see `claimed`.
    """

    def __init__(self, directory: Path, *, run: str = "", log_id: str = "") -> None:
        self.directory = directory
        self.run = run
        self.log_id = log_id
        self._lock = threading.Lock()
        self._waiting: dict[str, list[Held]] = defaultdict(list)
        self._bytes = 0
        recover(directory)
        self._unfinished: Commit | None = None
        self._next = archived_positions(directory, log_id, [topic.name for topic in CATALOGUE])
        self._saved = dict(self._next)
        self._flush = last_flush(directory)
        self._known: dict[str, dict[Path, Part]] = {}

    def next_offsets(self) -> dict[tuple[str, int], int]:
        """(topic, partition) -> the first offset that was not dealt with; partitions never seen are absent."""
        with self._lock:
            return dict(self._next)

    @property
    def waiting_bytes(self) -> int:
        """Of values that are not written yet."""
        return self._bytes

    def add(self, delivered: Delivered) -> bool:
        """Take a message; False if it is archived already or another run's. Those of a partition come in order."""
        topic, partition, offset = delivered.position
        run = _run_of(delivered.value)
        with self._lock:
            if offset < self._next.get((topic, partition), 0):
                return False
            self._next[topic, partition] = offset + 1
            if self.run and run not in ("", self.run):
                return False
            self._waiting[topic].append((delivered, run or self.run))
            self._bytes += len(delivered.value)
            return True

    def flush(self) -> list[Path]:
        """Write what was added since the last call; OSError leaves it waiting for the next call."""
        try:
            return self._write_waiting()
        finally:
            _give_back()

    def merge(self, *, all_small: bool = False, give_up: Callable[[], bool] = lambda: False) -> int:
        """Merge small files of a folder where there are many, or any two of them; how many became fewer.

        `give_up` is asked between folders. OSError leaves the files as they were.
        """
        self._finish()
        merged = 0
        for topic in CATALOGUE:
            for files in _mergeable(self._parts(topic.name), self.log_id, all_small):
                if give_up():
                    return merged
                self._merge(files)
                _give_back()
                merged += len(files)
        return merged

    def _write_waiting(self) -> list[Path]:
        self._finish()
        with self._lock:
            waiting, self._waiting = self._waiting, defaultdict(list)
            held, self._bytes = self._bytes, 0
            positions = dict(self._next)
        if positions == self._saved:
            return []
        self._flush += 1
        staged: list[Path] = []
        try:
            for path, messages in _by_folder(self.directory, waiting).items():
                staged.append(self._write(path, messages))
            self._change(positions, staged, [])
        except OSError:
            _discard(staged)
            self._put_back(waiting, held)
            raise
        self._finish()
        return staged

    def _write(self, path: Path, messages: Sequence[Delivered]) -> Path:
        table = described(table_of(messages), self.log_id, (self._flush, self._flush))
        return _stage(table.schema, [table], path, self._flush)

    def _parts(self, topic: str) -> list[Part]:
        """The files of a topic; all have their names here, for the last change is finished."""
        before = self._known.get(topic, {})
        now = {path: before.get(path) or describe(path) for path in named(self.directory, topic)}
        self._known[topic] = now
        return in_order(now.values())

    def _merge(self, files: Sequence[Part]) -> None:
        schema = _schema_of(files, self.log_id)
        staged: list[Path] = []
        try:
            staged.append(_stage(schema, _rows_of(files, schema), files[0].path.parent, files[0].flushes[0]))
            self._change(self._saved, staged, [part.path for part in files])
        except OSError:
            _discard(staged)
            raise
        self._finish()

    def _change(self, positions: dict[tuple[str, int], int], add: Sequence[Path], remove: Sequence[Path]) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        after: dict[str, dict[int, int]] = defaultdict(dict)
        for (topic, partition), offset in positions.items():
            after[topic][partition] = offset
        names = [[str(path.relative_to(self.directory)) for path in paths] for paths in (add, remove)]
        commit = Commit(flush=self._flush, log=self.log_id, next=dict(after), add=names[0], remove=names[1])
        write_commit(self.directory, commit)
        self._unfinished, self._saved = commit, positions

    def _finish(self) -> None:
        """What an OSError kept from being renamed or removed is tried again before the next change."""
        if self._unfinished is not None:
            finish(self.directory, self._unfinished)
            self._unfinished = None

    def _put_back(self, waiting: dict[str, list[Held]], held: int) -> None:
        with self._lock:
            self._bytes += held
            for topic, messages in waiting.items():
                self._waiting[topic] = messages + self._waiting[topic]


def _run_of(value: bytes) -> str:
    """Empty for bytes that are no record."""
    try:
        return _run.decode(value).run
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""


def _by_folder(directory: Path, waiting: dict[str, list[Held]]) -> dict[Path, list[Delivered]]:
    """Each folder's messages in order of partition and offset."""
    found: dict[Path, list[Delivered]] = defaultdict(list)
    for topic, held in waiting.items():
        for message, run in held:
            found[folder(directory, topic, run, message.timestamp_ms)].append(message)
    return {path: sorted(messages, key=lambda message: message.position) for path, messages in found.items()}


def _mergeable(found: Sequence[Part], log_id: str, all_small: bool) -> list[list[Part]]:
    """Files to merge: neighbours in a folder, so that a merged file never spans a larger one between them."""
    folders: dict[Path, list[Part]] = defaultdict(list)
    for part in found:
        if part.log == log_id:
            folders[part.path.parent].append(part)
    runs = [run for files in folders.values() for kind in range(len(SIZES)) for run in _runs(files, kind, all_small)]
    chosen: list[list[Part]] = []
    for run in runs:  # smaller files first; what they become is looked at next time
        if not any(part in other for other in chosen for part in run):
            chosen.append(run)
    return chosen


def _runs(files: Sequence[Part], kind: int, all_small: bool) -> list[list[Part]]:
    """Neighbours of this size class or below, where enough of them are of the class itself."""
    if all_small and kind < len(SIZES) - 1:
        return []
    runs: list[list[Part]] = [[]]
    classes = {part.path: sum(part.size >= limit for limit in SIZES) for part in files}
    for part in files:
        if classes[part.path] <= kind:
            runs[-1].append(part)
        elif runs[-1]:
            runs.append([])
    if all_small:
        return [run for run in runs if len(run) > 1]
    return [run for run in runs if sum(classes[part.path] == kind for part in run) >= MERGE_AT]


def _schema_of(files: Sequence[Part], log_id: str) -> pa.Schema:
    """Of the file that these become: the columns of all, and what it says of itself."""
    spans: dict[int, tuple[int, int]] = {}
    for number in sorted({number for part in files for number in part.spans}):
        there = [part.spans[number] for part in files if number in part.spans]
        spans[number] = min(first for first, _ in there), max(after for _, after in there)
    flushes = (files[0].flushes[0], max(part.flushes[1] for part in files))
    columns = pa.unify_schemas([pq.read_schema(part.path) for part in files], promote_options="default")
    return columns.with_metadata(about(log_id, spans, flushes))


def _rows_of(files: Sequence[Part], schema: pa.Schema) -> Iterator[pa.Table]:
    """Their rows in order of partition and offset, in tables of whole partitions and about MERGE_BYTES."""
    numbers = sorted({number for part in files for number in part.spans})
    at_once = max(1, len(numbers) * MERGE_BYTES // max(1, sum(part.size for part in files)))
    for first in range(0, len(numbers), at_once):
        yield _together(files, schema, numbers[first : first + at_once])


def _together(files: Sequence[Part], schema: pa.Schema, chosen: Sequence[int]) -> pa.Table:
    """Their rows of these partitions: each file is in order, and later files have later offsets.

    They are slices of what was read: to sort would be to hold them twice.
    """
    tables = [rows for part in files for rows in _of_partitions(part.path, chosen)]
    places = [rows["partition"].to_pylist() for rows in tables]
    slices = [
        rows.slice(first, bisect_right(there, number) - first)
        for number in chosen
        for rows, there in zip(tables, places, strict=True)
        if (first := bisect_left(there, number)) < len(there)
    ]
    return pa.concat_tables([schema.empty_table(), *slices], promote_options="default")


def _give_back() -> None:
    """All that is free, of every thread. malloc keeps it otherwise, ever more: what comes next lies scattered in it."""
    pa.default_memory_pool().release_unused()


def _of_partitions(path: Path, chosen: Sequence[int]) -> Iterator[pa.Table]:
    """Their rows in a file, a row group at a time: Arrow's own scanner reads many ahead, each of them whole."""
    with pq.ParquetFile(path) as file:
        for number in range(file.num_row_groups):
            known = statistics(file.metadata.row_group(number), "partition")
            if known is None or any(known.min <= partition <= known.max for partition in chosen):
                rows = file.read_row_group(number, use_threads=False)
                yield rows.filter(pc.is_in(rows["partition"], pa.array(chosen, rows["partition"].type)))


def _stage(schema: pa.Schema, tables: Iterable[pa.Table], directory: Path, flush: int) -> Path:
    """A complete file under its hidden name; the name it is to have."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"part-{flush:08d}-{uuid.uuid4().hex}.parquet"
    try:
        with hidden(path).open("wb") as file:
            with pq.ParquetWriter(file, schema, compression="zstd", use_dictionary=_repeating(schema)) as writer:
                for table in tables:
                    rows = max(1, ROW_GROUP_BYTES * len(table) // max(1, table["value"].nbytes))
                    writer.write_table(table, row_group_size=rows)
                    del table  # before the next one is made: there is never more than one
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        hidden(path).unlink(missing_ok=True)
        raise
    return path


def _repeating(schema: pa.Schema) -> list[str]:
    """Columns whose values repeat: text. For token arrays and whole messages a dictionary would be tried in vain."""
    return [leaf for field in schema for leaf in _texts(field.name, field.type)]


def _texts(name: str, kind: pa.DataType) -> list[str]:
    if pa.types.is_list(kind):
        return _texts(f"{name}.list.element", kind.value_type)
    if pa.types.is_struct(kind):
        return [leaf for field in kind for leaf in _texts(f"{name}.{field.name}", field.type)]
    return [name] if pa.types.is_string(kind) else []


def _discard(staged: Sequence[Path]) -> None:
    for path in staged:
        hidden(path).unlink(missing_ok=True)
