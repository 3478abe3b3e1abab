"""Files of an archive: where they lie, what each says of itself, and how several change at once.

    archive/<topic>/run=<run>/day=<YYYY-MM-DD>/part-<flush>-<uuid>.parquet     UTC day of the messages' timestamps
    archive/_commit.json                                                       the last change
    archive/.lock                                                              held by the one process that writes

Invariant: a change (new files, files that they replace, positions) happens wholly or not at all, at any kill. The new
files are written and synced under hidden names; then `_commit.json` is replaced, which is the moment of the change;
then files are renamed and removed, and whoever opens the archive next finishes that. A reader of ours goes by the
commit; one that goes by file names alone (pandas, duckdb) sees a change a few milliseconds later. A file never changes,
and nobody but the writer removes one. Where the archive ends is the commit's word; files say it where that was lost.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from urllib.parse import quote, unquote

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from kat_stream.errors import ArchiveInUse, DataError
from kat_stream.locks import try_lock

NO_RUN = "__HIVE_DEFAULT_PARTITION__"
"""Hive's name for null: bytes of which nobody knows the run, where all runs are archived together."""
ABOUT = b"kat_stream.part"
"""Metadata of a file: {"log": id, "spans": {partition: [first offset, next offset]}, "flushes": [first, last]}."""
POLL_S = 0.1
LOOKS = 10
"""Listings in a row that merges may outrun before it is an error; one merge takes longer than one look."""
DAY_MS = 24 * 3600 * 1000
Spans = Mapping[int, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Part:
    """One file and what it says of itself."""

    path: Path
    log: str
    """The log that its offsets belong to."""
    spans: Spans
    """Partition -> [first, next) offset; within, other runs' messages are missing."""
    flushes: tuple[int, int]
    """First and last flush that its messages came with: later flushes have later offsets, in every partition."""
    size: int
    """Bytes of its rows before they were compressed."""

    @property
    def run(self) -> str:
        """Empty: unknown."""
        name = unquote(self.path.parent.parent.name.removeprefix("run="))
        return "" if name == NO_RUN else name


class Commit(msgspec.Struct, kw_only=True):
    """One change of the archive."""

    flush: int = 0
    """Flushes so far."""
    log: str = ""
    next: dict[str, dict[int, int]] = {}
    """Topic -> partition -> the first offset of `log` that is not dealt with: archived, or another run's."""
    add: list[str] = []
    remove: list[str] = []
    """Paths within the archive."""


def folder(directory: Path, topic: str, run: str, timestamp_ms: int) -> Path:
    """A time outside the calendar is of its first or last day: a producer's clock may say anything."""
    days = date(1970, 1, 1).toordinal() + timestamp_ms // DAY_MS
    day = date.fromordinal(min(max(days, date.min.toordinal()), date.max.toordinal()))
    return directory / topic / f"run={quote(run, safe='') or NO_RUN}" / f"day={day.isoformat()}"


def hidden(path: Path) -> Path:
    """Where a file lies until its commit."""
    return path.with_name(f".{path.name}.tmp")


def read_commit(directory: Path) -> Commit:
    """The last change; an empty one in a new archive. DataError if it is damaged."""
    try:
        return msgspec.json.decode((directory / "_commit.json").read_bytes(), type=Commit)
    except FileNotFoundError:
        return Commit()
    except msgspec.DecodeError as error:
        raise DataError(f"{directory}/_commit.json: {error}") from error


def write_commit(directory: Path, commit: Commit) -> None:
    """The moment of the change. The files in `add` are complete under their hidden names."""
    temporary = directory / "._commit.json.tmp"
    with temporary.open("wb") as file:
        file.write(msgspec.json.encode(commit))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(directory / "_commit.json")


def finish(directory: Path, commit: Commit) -> None:
    """Make the file names what the commit says, once it is on disk itself; doing it again changes nothing."""
    if commit.add or commit.remove:
        _sync(directory)
    for name in commit.add:
        with suppress(FileNotFoundError):
            hidden(directory / name).rename(directory / name)
    for name in commit.remove:
        (directory / name).unlink(missing_ok=True)
    for parent in {(directory / name).parent for name in (*commit.add, *commit.remove)}:
        _sync(parent)


def recover(directory: Path) -> Commit:
    """What a killed writer left: its last commit is finished, files that never came to one are removed."""
    commit = read_commit(directory)
    finish(directory, commit)
    for leftover in directory.rglob(".part-*.tmp"):
        leftover.unlink(missing_ok=True)
    return commit


def parts(directory: Path, topic: str) -> list[Part]:
    """The files of a topic as of the last commit, in the order of their first flush.

    Looks again where an archiver merged files between the list and the look. DataError: a file is no archive's, or one
    that the last commit made is gone.
    """
    for _ in range(LOOKS):
        commit = read_commit(directory)
        try:
            return _parts_of(directory, topic, commit)
        except FileNotFoundError as error:
            if read_commit(directory) == commit:
                raise DataError(f"{directory}: the archive has lost a file: {error}") from error
    raise DataError(f"{directory / topic}: its files change faster than they can be listed")


def _parts_of(directory: Path, topic: str, commit: Commit) -> list[Part]:
    found = named(directory, topic) - {directory / name for name in commit.remove}
    added = {directory / name for name in commit.add if name.startswith(f"{topic}/")}
    described = [*map(describe, sorted(found)), *map(_describe_added, sorted(added - found))]
    return in_order(described)


def _describe_added(path: Path) -> Part:
    """A file of the last commit that had not its name yet; the writer may give it the name meanwhile."""
    try:
        return describe(hidden(path))
    except FileNotFoundError:
        return describe(path)


def named(directory: Path, topic: str) -> set[Path]:
    """The files of a topic that have their names; DataError for an archive of another layout."""
    foreign = next(iter((directory / topic).glob("part-*.parquet")), None)
    if foreign is not None:
        raise DataError(f"{foreign}: an archive of kat-stream 0.1.0 or a foreign file; this build reads run=*/day=*")
    return set((directory / topic).glob("run=*/day=*/part-*.parquet"))


def in_order(found: Iterable[Part]) -> list[Part]:
    """By their first flush."""
    return sorted(found, key=lambda part: (part.flushes, part.path.name))


def describe(path: Path) -> Part:
    """What a file says of itself; DataError if it is no file of an archive."""
    try:
        metadata = pq.read_metadata(path)
        said = json.loads(metadata.metadata[ABOUT])
    except (pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: no archive of a topic: {error}") from error
    spans = {int(partition): (first, after) for partition, (first, after) in said["spans"].items()}
    size = sum(metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups))
    return Part(path, said["log"], spans, (said["flushes"][0], said["flushes"][1]), size)


def described(table: pa.Table, log: str, flushes: tuple[int, int]) -> pa.Table:
    """The table with what its file is to say of itself; rows in order of partition and offset."""
    spans: dict[int, tuple[int, int]] = {}
    for partition, offset in zip(table["partition"].to_pylist(), table["offset"].to_pylist(), strict=True):
        first = spans.get(partition, (offset, 0))[0]
        spans[partition] = (first, offset + 1)
    return table.replace_schema_metadata(about(log, spans, flushes))


def about(log: str, spans: Spans, flushes: tuple[int, int]) -> dict[bytes, bytes]:
    """What a file says of itself, as its metadata."""
    return {ABOUT: json.dumps({"log": log, "spans": spans, "flushes": flushes}).encode()}


def statistics(group: pq.RowGroupMetaData, column: str) -> pq.Statistics | None:
    """What a file says of a column's values in one row group."""
    columns = (group.column(number) for number in range(group.num_columns))
    return next(found.statistics for found in columns if found.path_in_schema == column)


def last_flush(directory: Path) -> int:
    """The number of the last flush, also where the commit was lost."""
    found = (int(path.name.split("-")[1]) for path in directory.glob("*/run=*/day=*/part-*.parquet"))
    return max((read_commit(directory).flush, *found))


def archived_positions(directory: Path, log: str, topics: Iterable[str]) -> dict[tuple[str, int], int]:
    """(topic, partition) -> the first offset of this log that the archive has not dealt with.

    The commit says it; files are looked at only where it was lost or is of another log. DataError as `parts`.
    """
    commit = read_commit(directory)
    if commit.log == log and commit.next:
        return {(topic, number): offset for topic in topics for number, offset in commit.next.get(topic, {}).items()}
    after: dict[tuple[str, int], int] = {}
    for topic in topics:
        for part in parts(directory, topic):
            for partition, (_, offset) in part.spans.items() if part.log == log else ():
                after[topic, partition] = max(offset, after.get((topic, partition), 0))
    return after


@contextmanager
def claimed(directory: Path, deadline_s: float = 10.0) -> Iterator[None]:
    """Nobody else writes to this archive meanwhile; ArchiveInUse if somebody still does at the deadline.

    The kernel lets go of it when the process ends, however it ends.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("a+") as file:
        give_up = time.monotonic() + deadline_s
        while not try_lock(file.fileno()):
            if time.monotonic() > give_up:
                file.seek(0)
                raise ArchiveInUse(f"{directory}: another archiver writes here ({file.read() or 'unknown'})")
            time.sleep(POLL_S)
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
