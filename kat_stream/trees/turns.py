"""Turns as the learner sees them: full prompt path, sampled ids, behaviour log-probabilities.

Invariant: a `TurnTokens` that exists can be trained on: it has a prompt, sampled tokens, and one finite log-probability
(<= 0) for each of them. Ids are those that were sampled; nothing is ever re-encoded from text.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kat_stream.errors import TurnError
from kat_stream.trees.routes import Pieces, first_rows, unknown
from topics.turn import Turn, VersionSpan

LOGPROB_SLACK = 1e-3
"""Engines round: a log-probability may exceed 0 by this much before it counts as nonsense."""


@dataclass(frozen=True, eq=False, slots=True)
class TurnTokens:
    """One model call. Raises `TurnError` naming turn and field if it cannot be trained on."""

    turn_id: str
    prompt_ids: NDArray[np.int32]
    """int32[P]: the whole path from the root, P >= 1."""
    sampled_ids: NDArray[np.int32]
    """int32[T], T >= 1, the stop token included."""
    logprobs: NDArray[np.float32]
    """float32[T]: behaviour log-probabilities in nats, one per sampled id."""
    versions: tuple[VersionSpan, ...] = ()
    """Which policy version sampled which tokens."""
    trainable: bool = True
    """False: recorded for people, left out of the tree."""
    scored_logprobs: NDArray[np.float32] | None = None
    """float32[T]: averaged over repeated prefills (MCLA), NaN for tokens that were not scored; None: not scored."""
    teacher_logprobs: NDArray[np.float32] | None = None
    """float32[T] under a teacher, NaN for tokens without; None: no teacher."""
    routes: Pieces = ()
    """uint16[P + T - 1, W] in pieces: experts of every token but the last (`trees.routes`); empty: not recorded."""

    def __post_init__(self) -> None:
        if self.routes:
            _check_routes(self)
        _check_given(self, "scored_logprobs")
        _check_given(self, "teacher_logprobs")
        if self.trainable:
            _check_ids(self.turn_id, "prompt_ids", self.prompt_ids)
            _check_ids(self.turn_id, "sampled_ids", self.sampled_ids)
            _check_logprobs(self)


def turns_of(records: Iterable[Turn]) -> list[TurnTokens]:
    """Deltas back to full paths, in the given order; parents come before their children.

    Raises `TurnError` for an unknown parent, for a prefix longer than the parent's path and for all that
    `TurnTokens` refuses.
    """
    paths: dict[str, NDArray[np.int32]] = {}
    routes: dict[str, Pieces] = {}
    turns: list[TurnTokens] = []
    for record in records:
        new, sampled = _array(record, "prompt_ids", "<i4"), _array(record, "sampled_ids", "<i4")
        path = np.concatenate([_prefix(record, paths), new, sampled]).astype(np.int32, copy=False)
        paths[record.turn_id] = path
        prompt, sampled = path[: len(path) - len(sampled)], path[len(path) - len(sampled) :]
        logprobs = _array(record, "logprobs", "<f4").astype(np.float32)
        known = routes[record.turn_id] = _routes(record, routes.get(record.parent, ()), len(prompt) + len(sampled))
        turns.append(
            TurnTokens(record.turn_id, prompt, sampled, logprobs, record.spans, record.trainable, routes=known)
        )
    return turns


def _routes(record: Turn, above: Pieces, length: int) -> Pieces:
    """What the parent's path recorded, and what this record adds; `length` of the whole path in tokens."""
    begin = max(record.prefix_len - 1, 0)
    count, data = length - 1 - begin, record.routed_experts
    if data and (count < 1 or len(data) % (2 * count)):
        raise TurnError(f"turn {record.turn_id}: routed_experts has {len(data)} bytes for {count} tokens")
    own = np.frombuffer(data, "<u2").astype(np.uint16).reshape(count, -1) if data else None
    if own is None and not above:
        return ()
    width = above[0].shape[1] if own is None else own.shape[1]
    before = first_rows(above, begin) if above else (unknown(begin, width),)
    return tuple(piece for piece in (*before, unknown(count, width) if own is None else own) if len(piece))


def _prefix(record: Turn, paths: dict[str, NDArray[np.int32]]) -> NDArray[np.int32]:
    if not record.parent:
        if record.prefix_len:
            raise TurnError(f"turn {record.turn_id}: prefix_len is {record.prefix_len}, but it has no parent")
        return np.empty(0, np.int32)
    path = paths.get(record.parent)
    if path is None:
        raise TurnError(f"turn {record.turn_id}: parent {record.parent!r} is not among the turns before it")
    if not 0 <= record.prefix_len <= len(path):
        raise TurnError(
            f"turn {record.turn_id}: prefix_len {record.prefix_len} is no prefix of its parent's {len(path)} tokens"
        )
    return path[: record.prefix_len]


def _array(record: Turn, name: str, dtype: str) -> NDArray[Any]:
    data: bytes = getattr(record, name)
    if len(data) % 4:
        raise TurnError(f"turn {record.turn_id}: {name} has {len(data)} bytes, not a multiple of 4")
    return np.frombuffer(data, dtype)


def _check_ids(turn_id: str, name: str, ids: NDArray[np.int32]) -> None:
    if ids.dtype != np.int32 or ids.ndim != 1:
        raise TurnError(f"turn {turn_id}: {name} is {ids.dtype}{list(ids.shape)}, expected int32[n]")
    if not len(ids):
        raise TurnError(f"turn {turn_id}: {name} is empty")
    if ids.min() < 0:
        raise TurnError(f"turn {turn_id}: {name} holds the negative id {ids.min()}")


def _check_given(turn: TurnTokens, name: str) -> None:
    """What is optional may be NaN, but has a value for each sampled token and none that is no log-probability."""
    values: NDArray[np.float32] | None = getattr(turn, name)
    if values is None:
        return
    if values.dtype != np.float32 or values.shape != turn.sampled_ids.shape:
        shape = f"{values.dtype}{list(values.shape)}"
        raise TurnError(f"turn {turn.turn_id}: {name} is {shape} for {len(turn.sampled_ids)} sampled ids")
    if np.isinf(values).any() or (values > LOGPROB_SLACK).any():
        raise TurnError(f"turn {turn.turn_id}: {name} holds what is no log-probability")


def _check_routes(turn: TurnTokens) -> None:
    rows, wanted = sum(len(piece) for piece in turn.routes), len(turn.prompt_ids) + len(turn.sampled_ids) - 1
    widths = {piece.shape[1] for piece in turn.routes}
    if rows != wanted or len(widths) != 1 or 0 in widths:
        raise TurnError(f"turn {turn.turn_id}: routes have {rows} rows of widths {sorted(widths)}, expected {wanted}")


def _check_logprobs(turn: TurnTokens) -> None:
    if turn.logprobs.dtype != np.float32 or turn.logprobs.shape != turn.sampled_ids.shape:
        shape = f"{turn.logprobs.dtype}{list(turn.logprobs.shape)}"
        raise TurnError(f"turn {turn.turn_id}: logprobs is {shape} for {len(turn.sampled_ids)} sampled ids")
    bad = ~(np.isfinite(turn.logprobs) & (turn.logprobs <= LOGPROB_SLACK))
    if bad.any():
        at = int(bad.argmax())
        raise TurnError(f"turn {turn.turn_id}: logprobs[{at}] is {turn.logprobs[at]}, no log-probability")
