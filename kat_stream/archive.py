"""Topics as Parquet: a run can be read when its log is gone. Owns the folder `archive/` of a run.

    archive/<topic>/part-<timestamp_ms of its first message>-<uuid>.parquet

Invariants: a file is whole or not there (written under a temporary name, synced, renamed); a message is archived once
over any number of restarts, because the files themselves say up to which offset they go; values are the log's bytes.
Offsets have a meaning within one log only, so each file names its log: a run that goes on with a new in-memory log
starts again at offset 0, and both halves are kept.
"""

from __future__ import annotations

import json
import os
import threading
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from kat_stream.errors import DataError
from kat_stream.log.base import Delivered, Position
from topics import CATALOGUE

SCHEMA = pa.schema(
    [
        ("run", pa.string()),
        ("topic", pa.string()),
        ("partition", pa.int32()),
        ("offset", pa.int64()),
        ("timestamp_ms", pa.int64()),
        ("key", pa.binary()),
        ("record", pa.string()),
        ("group_id", pa.string()),
        ("rollout_id", pa.string()),
        ("value", pa.binary()),
    ]
)
_SPANS = b"kat_stream.spans"
"""Schema metadata: {"log": log_id, "spans": {partition: [first offset, next offset]}, "first_ms": int}."""


class _Ids(msgspec.Struct):
    """What the columns need of a record; everything else in the message is skipped, not decoded."""

    run: str = ""
    group_id: str = ""
    rollout_id: str = ""


_ids = msgspec.msgpack.Decoder(_Ids)


class ArchiveWriter:
    """Collects delivered messages and writes them in files. `add` and `flush` may be called from two threads.

    `run`: take only this run's records; empty: all. `log_id` names the log that offsets belong to: constant for a Kafka
    cluster, fresh for each in-memory log.
    """

    def __init__(self, directory: Path, *, run: str = "", log_id: str = "") -> None:
        self.directory = directory
        self.run = run
        self.log_id = log_id
        self._lock = threading.Lock()
        self._waiting: dict[str, list[Delivered]] = defaultdict(list)
        self._next = _archived(directory, log_id)

    def next_offsets(self) -> dict[tuple[str, int], int]:
        """(topic, partition) -> the first offset that has not been added; partitions never seen are absent."""
        with self._lock:
            return dict(self._next)

    def add(self, delivered: Delivered) -> bool:
        """Take a message; False if it is archived already or another run's. Those of a partition come in order."""
        topic, partition, offset = delivered.position
        if self.run and _read_ids(delivered.value).run not in ("", self.run):
            return False
        with self._lock:
            if offset < self._next.get((topic, partition), 0):
                return False
            self._waiting[topic].append(delivered)
            self._next[topic, partition] = offset + 1
            return True

    def flush(self) -> list[Path]:
        """Write what was added since the last call, one file a topic; OSError leaves it waiting for the next call."""
        with self._lock:
            waiting, self._waiting = self._waiting, defaultdict(list)
        written: list[Path] = []
        for topic in list(waiting):
            try:
                written.append(_write(self.directory / topic, waiting[topic], self.log_id))
            except OSError:
                self._put_back(waiting)
                raise
            del waiting[topic]
        return written

    def _put_back(self, waiting: dict[str, list[Delivered]]) -> None:
        with self._lock:
            for topic, messages in waiting.items():
                self._waiting[topic] = messages + self._waiting[topic]


def read_archive(directory: Path, topics: Sequence[str] | None = None) -> Iterator[Delivered]:
    """Every archived message once, by (topic, log, partition, offset); topics in pipeline order. One topic in memory.

    `DataError` for a file that is no archive.
    """
    for topic in topics if topics is not None else [topic.name for topic in CATALOGUE]:
        files = [_describe(path) for path in _parts(directory / topic)]
        order = {log: first for first, log in sorted(((first, log) for _, log, _, first in files), reverse=True)}
        for log in sorted(order, key=order.__getitem__):
            yield from _read([path for path, name, _, _ in files if name == log])


def _write(directory: Path, messages: Sequence[Delivered], log_id: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    messages = sorted(messages, key=lambda message: message.position)
    first_ms = min(message.timestamp_ms for message in messages)
    metadata = {"log": log_id, "spans": _spans(messages), "first_ms": first_ms}
    table = pa.Table.from_pylist([_row(message) for message in messages], SCHEMA)
    table = table.replace_schema_metadata({_SPANS: json.dumps(metadata).encode()})
    name = f"part-{first_ms}-{uuid.uuid4().hex}.parquet"
    temporary = directory / f".{name}.tmp"
    with temporary.open("wb") as file:
        pq.write_table(table, file, compression="zstd")
        file.flush()
        os.fsync(file.fileno())
    path = directory / name
    temporary.rename(path)
    return path


def _row(message: Delivered) -> dict[str, Any]:
    ids = _read_ids(message.value)
    return {
        "run": ids.run,
        "topic": message.position.topic,
        "partition": message.position.partition,
        "offset": message.position.offset,
        "timestamp_ms": message.timestamp_ms,
        "key": message.key,
        "record": message.headers.get("record", b"").decode(errors="replace"),
        "group_id": ids.group_id,
        "rollout_id": ids.rollout_id,
        "value": message.value,
    }


def _read_ids(value: bytes) -> _Ids:
    try:
        return _ids.decode(value)
    except msgspec.DecodeError:
        return _Ids()  # bytes that are no record are archived as they are, without ids


def _spans(messages: Iterable[Delivered]) -> dict[int, tuple[int, int]]:
    spans: dict[int, tuple[int, int]] = {}
    for _, partition, offset in (message.position for message in messages):
        first, after = spans.get(partition, (offset, offset + 1))
        spans[partition] = (min(first, offset), max(after, offset + 1))
    return spans


def _parts(directory: Path) -> list[Path]:
    return sorted(directory.glob("part-*.parquet"))


def _describe(path: Path) -> tuple[Path, str, dict[int, tuple[int, int]], int]:
    """(path, log id, partition -> (first, next offset), first timestamp in ms)."""
    try:
        metadata = json.loads(pq.read_schema(path).metadata[_SPANS])
    except (pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: no archive of a topic: {error}") from error
    spans = {int(partition): (first, after) for partition, (first, after) in metadata["spans"].items()}
    return path, metadata["log"], spans, metadata["first_ms"]


def _archived(directory: Path, log_id: str) -> dict[tuple[str, int], int]:
    after: dict[tuple[str, int], int] = {}
    for topic in CATALOGUE:
        for path in _parts(directory / topic.name):
            _, log, spans, _ = _describe(path)
            for partition, (_, next_offset) in spans.items() if log == log_id else ():
                after[topic.name, partition] = max(next_offset, after.get((topic.name, partition), 0))
    return after


def _read(paths: Sequence[Path]) -> Iterator[Delivered]:
    """The messages of one topic and one log."""
    table = pa.concat_tables([pq.read_table(path, schema=SCHEMA) for path in paths])
    table = table.sort_by([("partition", "ascending"), ("offset", "ascending")])
    seen = (-1, -1)
    for batch in table.to_batches():
        for row in batch.to_pylist():
            if (row["partition"], row["offset"]) != seen:
                seen = (row["partition"], row["offset"])
                yield _delivered(row)


def _delivered(row: dict[str, Any]) -> Delivered:
    return Delivered(
        position=Position(row["topic"], row["partition"], row["offset"]),
        key=row["key"],
        value=row["value"],
        headers={"record": row["record"].encode()} if row["record"] else {},
        timestamp_ms=row["timestamp_ms"],
    )
