"""Rows as a Parquet file that `datasets.load_dataset(FOLDER)` reads as its split `train`.

JSON columns have Arrow's JSON type, so that `datasets` gives them back as values.
Invariant: the file has its name only when it is complete, and never replaces another. Without a row there is none, for
`datasets` loads no file without rows and a later export may have some.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kat_stream.env.manager.base import Columns, Kind, Row
from kat_stream.errors import StorageError

ROW_GROUP = 256
"""Rows that are held and written at once."""
NAME = "train.parquet"
_TYPES: Mapping[Kind, pa.DataType] = {
    "bool": pa.bool_(),
    "int64": pa.int64(),
    "float64": pa.float64(),
    "string": pa.string(),
    "json": pa.json_(),
    "int32[]": pa.list_(pa.int32()),
    "float32[]": pa.list_(pa.float32()),
    "string[]": pa.list_(pa.string()),
    "json[]": pa.list_(pa.json_()),
}


@dataclass(slots=True)
class RowWriter:
    """Takes rows one by one and holds at most a row group of them."""

    columns: Columns
    writer: pq.ParquetWriter
    count: int = 0
    _waiting: list[Row] = field(default_factory=list)

    def add(self, row: Row) -> None:
        self._waiting.append(_plain(row, self.columns))
        self.count += 1
        if len(self._waiting) == ROW_GROUP:
            self.flush()

    def flush(self) -> None:
        if self._waiting:
            self.writer.write_table(_table(self._waiting, self.columns))
            self._waiting.clear()


@contextmanager
def open_rows(directory: Path, columns: Columns) -> Iterator[RowWriter]:
    """Write `train.parquet`, complete when the block ends; StorageError if it is there by then or cannot be written."""
    path = directory / NAME
    hidden = directory / f".{NAME}.{uuid.uuid4().hex}"
    try:
        if path.exists():
            raise StorageError(f"{path} exists; give another folder or remove it")
        directory.mkdir(parents=True, exist_ok=True)
        try:
            with pq.ParquetWriter(hidden, _schema(columns), compression="zstd") as parquet:
                writer = RowWriter(columns, parquet)
                yield writer
                writer.flush()
            if writer.count:
                path.hardlink_to(hidden)  # unlike a rename it replaces nothing that came meanwhile
        finally:
            hidden.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}") from error


def _schema(columns: Columns, types: Mapping[Kind, pa.DataType] = _TYPES) -> pa.Schema:
    return pa.schema([(name, types[kind]) for name, kind in columns.items()])


def _table(rows: list[Row], columns: Columns) -> pa.Table:
    # Arrow makes arrays of JSON by a cast only.
    texts: dict[Kind, pa.DataType] = {**_TYPES, "json": pa.string(), "json[]": pa.list_(pa.string())}
    return pa.Table.from_pylist(rows, _schema(columns, texts)).cast(_schema(columns))


def _plain(row: Row, columns: Columns) -> Row:
    """A row with JSON columns as text. A missing column is the format's bug: KeyError."""
    out = {name: row[name] for name in columns}
    for name, kind in columns.items():
        if kind == "json" and out[name] is not None:
            out[name] = _text(out[name])
        elif kind == "json[]":
            out[name] = [_text(value) for value in out[name]]
    return out


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
