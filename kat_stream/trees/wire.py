"""A batch to and from plain arrays: one dict of little-endian arrays a row, named like the fields of `PackedRow`.

Invariant: `from_arrays(to_arrays(b), b.rollout_ids)` equals b, and nothing that breaks the tree invariant gets in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kat_stream.errors import BatchError
from kat_stream.trees.batch import OPTIONAL, TrainBatch, check_batch, join_optional, number_turns
from kat_stream.trees.layout import Routes, TreeLayout

INTS = ("ids", "pos", "parent", "end", "turn_len", "index", "member")
FLOATS = ("logprobs", "advantage", "weight")
ROUTES = "routed_experts"
"""uint16[N, W], row-major; a row may lack it."""
ROW_FIELDS = {**dict.fromkeys(INTS, np.dtype("<i4")), **dict.fromkeys(FLOATS, np.dtype("<f4"))}
"""As in `topics.batch.PackedRow`, where each is described. A row may also have those of OPTIONAL, like `logprobs`."""

Row = Mapping[str, NDArray[Any]]


def to_arrays(batch: TrainBatch) -> list[dict[str, NDArray[Any]]]:
    """One dict a row; `array.tobytes()` of each value is what the wire record holds."""
    rows: list[dict[str, NDArray[Any]]] = []
    token = 0
    for row in batch.rows:
        turns = slice(row.turns[0], row.turns[-1] + 1) if len(row.turns) else slice(0)
        values: dict[str, NDArray[Any]] = {
            "ids": row.ids,
            "pos": row.pos,
            "parent": row.parent,
            "end": row.end,
            "turn_len": row.lengths,
            "index": row.index,
            "member": batch.rollout[turns],
            "logprobs": batch.logprobs[token : token + len(row.index)],
            "advantage": batch.advantage[turns],
            "weight": batch.weight[turns],
        }
        sampled = slice(token, token + len(row.index))
        given = {name: getattr(batch, name) for name in OPTIONAL}
        values |= {name: array[sampled] for name, array in given.items() if array is not None}
        if row.routes is not None:
            values[ROUTES] = row.routes
        rows.append({name: np.ascontiguousarray(value, _dtype(name)) for name, value in values.items()})
        token += len(row.index)
    return rows


def from_arrays(rows: Sequence[Row], rollout_ids: Sequence[str]) -> TrainBatch:
    """Arrays back to a batch; raises `BatchError` naming row and field for anything inconsistent."""
    layouts, _ = number_turns([_layout(number, row) for number, row in enumerate(rows)])
    batch = TrainBatch(
        rows=layouts,
        logprobs=_column(rows, "logprobs"),
        advantage=_column(rows, "advantage"),
        weight=_column(rows, "weight"),
        rollout=_column(rows, "member"),
        rollout_ids=tuple(rollout_ids),
        teacher_logprobs=_optional(rows, "teacher_logprobs"),
        scored_logprobs=_optional(rows, "scored_logprobs"),
    )
    check_batch(batch)
    return batch


def arrays_of(row: Any) -> dict[str, NDArray[Any]]:
    """The arrays inside a wire row: any object with bytes under the names of `ROW_FIELDS`."""
    arrays: dict[str, NDArray[Any]] = {}
    for name, dtype in ROW_FIELDS.items():
        data = getattr(row, name)
        if len(data) % dtype.itemsize:
            raise BatchError(f"{name} has {len(data)} bytes, not a multiple of {dtype.itemsize}")
        arrays[name] = np.frombuffer(data, dtype)
    return arrays | _given(row)


def _given(row: Any) -> dict[str, NDArray[Any]]:
    """What the wire row has of OPTIONAL."""
    found = {name: getattr(row, name) for name in OPTIONAL if getattr(row, name)}
    for name, data in found.items():
        if len(data) % 4:
            raise BatchError(f"{name} has {len(data)} bytes, not a multiple of 4")
    arrays = {name: np.frombuffer(data, _dtype(name)) for name, data in found.items()}
    return arrays | ({ROUTES: _routes(row)} if row.routed_experts else {})


def _routes(row: Any) -> Routes:
    tokens, data = len(row.ids) // 4, row.routed_experts
    if not tokens or len(data) % (2 * tokens):
        raise BatchError(f"{ROUTES} has {len(data)} bytes for {tokens} tokens")
    return np.frombuffer(data, _dtype(ROUTES)).reshape(tokens, -1)


def _dtype(name: str) -> np.dtype[Any]:
    if name == ROUTES:
        return np.dtype("<u2")
    return ROW_FIELDS["logprobs" if name in OPTIONAL else name]


def _optional(rows: Sequence[Row], name: str) -> NDArray[np.float32] | None:
    for number, row in enumerate(rows):
        if name in row and len(row[name]) != len(row["logprobs"]):
            raise BatchError(f"row {number}: {name} has {len(row[name])} entries, expected {len(row['logprobs'])}")
    return join_optional([row.get(name) for row in rows], [row["logprobs"] for row in rows])


def _layout(number: int, row: Row) -> TreeLayout:
    for name, dtype in ROW_FIELDS.items():
        if name not in row:
            raise BatchError(f"row {number}: {name} is missing")
        if row[name].dtype != dtype or row[name].ndim != 1:
            raise BatchError(f"row {number}: {name} is {row[name].dtype}{list(row[name].shape)}, expected {dtype}[n]")
    ids, pos, parent, end, lengths, index = (row[name].astype(np.int32) for name in INTS[:-1])
    for name, size in _sizes(row):
        if len(row[name]) != size:
            raise BatchError(f"row {number}: {name} has {len(row[name])} entries, expected {size}")
    routes = row[ROUTES].astype(np.uint16) if ROUTES in row else None
    if routes is not None and routes.shape[:1] != ids.shape:
        raise BatchError(f"row {number}: {ROUTES} has {len(routes)} entries, expected {len(ids)}")
    return TreeLayout(ids, pos, parent, end, np.zeros(len(lengths), np.int32), lengths, index, routes)


def _sizes(row: Row) -> list[tuple[str, int]]:
    turns, tokens, sampled = len(row["turn_len"]), len(row["ids"]), len(row["index"])
    per_token = [(name, tokens) for name in ("pos", "parent", "end")]
    return [*per_token, ("logprobs", sampled), *((name, turns) for name in ("member", "advantage", "weight"))]


def _column(rows: Sequence[Row], name: str) -> NDArray[Any]:
    native = ROW_FIELDS[name].newbyteorder("=")
    return np.concatenate([np.empty(0, native), *(row[name] for row in rows)]).astype(native)
