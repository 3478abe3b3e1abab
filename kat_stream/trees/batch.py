"""What one optimizer step learns from: rows of trees, and per-turn arrays in the order in which the rows list turns.

Invariant: turn k of the batch is the k-th turn met when reading `rows` in order, so `rows[i].turns` are consecutive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kat_stream.errors import BatchError
from kat_stream.trees.forest import build_forest
from kat_stream.trees.layout import TreeLayout, check_layout
from kat_stream.trees.packing import pack
from kat_stream.trees.routes import with_routes
from kat_stream.trees.turns import TurnTokens

OPTIONAL = ("teacher_logprobs", "scored_logprobs")
"""Arrays over sampled tokens that a batch may lack, and in which NaN says that a token lacks it."""


@dataclass(frozen=True, eq=False, slots=True)
class TrainBatch:
    """M turns of R rollouts; raises `BatchError` if arrays and rows disagree."""

    rows: tuple[TreeLayout, ...]
    logprobs: NDArray[np.float32]
    """float32[sum of turn lengths]: behaviour log-probabilities, turn after turn."""
    advantage: NDArray[np.float32]
    """float32[M]."""
    weight: NDArray[np.float32]
    """float32[M] >= 0: share of the turn before normalisation over the step."""
    rollout: NDArray[np.int32]
    """int32[M]: which of `rollout_ids` the turn belongs to."""
    rollout_ids: tuple[str, ...]
    """The step's manifest."""
    ages: tuple[int, ...] = ()
    """Versions between each rollout's oldest token and the newest weights; empty if unknown."""
    teacher_logprobs: NDArray[np.float32] | None = None
    """float32[sum of turn lengths]: a teacher's log-probs of the sampled tokens, NaN where a turn has no teacher."""
    scored_logprobs: NDArray[np.float32] | None = None
    """float32[sum of turn lengths]: behaviour log-probs averaged over repeated prefills, NaN where not scored."""

    def __post_init__(self) -> None:
        turns = sum(len(row.turns) for row in self.rows)
        for name in ("advantage", "weight", "rollout"):
            if getattr(self, name).shape != (turns,):
                raise BatchError(f"{name} has shape {getattr(self, name).shape} for {turns} turns")
        if self.logprobs.shape != (self.trained_tokens,):
            raise BatchError(f"logprobs has shape {self.logprobs.shape} for {self.trained_tokens} sampled tokens")
        for name in OPTIONAL:
            given = getattr(self, name)
            if given is not None and given.shape != self.logprobs.shape:
                raise BatchError(f"{name} has shape {given.shape} for {self.trained_tokens} sampled tokens")
        _check_values(self)

    @property
    def behaviour(self) -> NDArray[np.float32]:
        """float32[sum of turn lengths]: pi_old of the ratio: scored where a token was scored, else as sampled."""
        scored = self.scored_logprobs
        return self.logprobs if scored is None else np.where(np.isnan(scored), self.logprobs, scored)

    @property
    def lengths(self) -> NDArray[np.int32]:
        """int32[M]: sampled tokens of each turn."""
        return np.concatenate([np.empty(0, np.int32), *(row.lengths for row in self.rows)])

    @property
    def trained_tokens(self) -> int:
        return sum(len(row.index) for row in self.rows)

    @property
    def tree_tokens(self) -> int:
        """Tokens that the tree computes."""
        return sum(len(row) for row in self.rows)

    @property
    def flat_tokens(self) -> int:
        """Tokens that training each leaf path apart would compute."""
        return sum(row.flat_tokens for row in self.rows)


def make_batch(
    turns: Sequence[TurnTokens],
    *,
    rollout: ArrayLike,
    advantage: ArrayLike,
    weight: ArrayLike,
    rollout_ids: Sequence[str],
    budget_tokens: int,
) -> TrainBatch:
    """Turns of one group, with per-turn rollout number, advantage and weight, as packed rows.

    Untrainable turns are left out.
    """
    packed = pack(build_forest(turns), budget_tokens)
    rows, order = number_turns([with_routes(row, [turns[i].routes for i in row.turns]) for row in packed])
    chosen = [turns[i].logprobs for i in order]
    return TrainBatch(
        rows=rows,
        logprobs=np.concatenate([np.empty(0, np.float32), *chosen]),
        advantage=np.asarray(advantage, np.float32)[order],
        weight=np.asarray(weight, np.float32)[order],
        rollout=np.asarray(rollout, np.int32)[order],
        rollout_ids=tuple(rollout_ids),
        teacher_logprobs=join_optional([turns[i].teacher_logprobs for i in order], chosen),
        scored_logprobs=join_optional([turns[i].scored_logprobs for i in order], chosen),
    )


def merge(batches: Sequence[TrainBatch], ages: Sequence[int] = ()) -> TrainBatch:
    """Batches of several groups as one step; `ages` are per rollout of the result."""
    rows, _ = number_turns([row for batch in batches for row in batch.rows])
    logprobs = [batch.logprobs for batch in batches]
    shift = np.cumsum([0, *(len(batch.rollout_ids) for batch in batches)])
    return TrainBatch(
        rows=rows,
        logprobs=_join(logprobs, np.float32),
        advantage=_join([batch.advantage for batch in batches], np.float32),
        weight=_join([batch.weight for batch in batches], np.float32),
        rollout=_join([batch.rollout + at for batch, at in zip(batches, shift, strict=False)], np.int32),
        rollout_ids=tuple(rollout for batch in batches for rollout in batch.rollout_ids),
        ages=tuple(ages),
        teacher_logprobs=join_optional([batch.teacher_logprobs for batch in batches], logprobs),
        scored_logprobs=join_optional([batch.scored_logprobs for batch in batches], logprobs),
    )


def take_rows(batch: TrainBatch, chosen: Sequence[int]) -> TrainBatch:
    """Some rows of a batch, in the given order, with their turns; rollouts keep their numbers."""
    turn_cuts = np.cumsum([0, *(len(row.turns) for row in batch.rows)])
    token_cuts = np.cumsum([0, *(len(row.index) for row in batch.rows)])
    turns = _ranges(turn_cuts, chosen)
    tokens = _ranges(token_cuts, chosen)
    given = {name: None if (array := getattr(batch, name)) is None else array[tokens] for name in OPTIONAL}
    return TrainBatch(
        rows=number_turns([batch.rows[i] for i in chosen])[0],
        logprobs=batch.logprobs[tokens],
        advantage=batch.advantage[turns],
        weight=batch.weight[turns],
        rollout=batch.rollout[turns],
        rollout_ids=batch.rollout_ids,
        ages=batch.ages,
        **given,
    )


def _ranges(cuts: NDArray[np.int64], chosen: Sequence[int]) -> NDArray[np.int64]:
    return np.concatenate([np.empty(0, np.int64), *(np.arange(cuts[i], cuts[i + 1]) for i in chosen)])


def join_optional(
    parts: Sequence[NDArray[np.float32] | None], like: Sequence[NDArray[np.float32]]
) -> NDArray[np.float32] | None:
    """The parts one after the other; NaN in the shape of its fellow in `like` for a missing one; None if all are."""
    if all(part is None for part in parts):
        return None
    missing = np.float32(np.nan)
    filled = [np.full_like(a, missing) if part is None else part for part, a in zip(parts, like, strict=True)]
    return _join(filled, np.float32)


def number_turns(rows: Sequence[TreeLayout]) -> tuple[tuple[TreeLayout, ...], NDArray[np.int32]]:
    """The rows with turns numbered 0, 1, ... in reading order, and the old number of each."""
    order = _join([row.turns for row in rows], np.int32)
    cuts = np.cumsum([0, *(len(row.turns) for row in rows)])
    spans = zip(rows, pairwise(cuts), strict=True)
    return tuple(replace(row, turns=np.arange(a, b, dtype=np.int32)) for row, (a, b) in spans), order


def check_batch(batch: TrainBatch) -> None:
    """`check_layout` on every row: for batches that come from outside the process."""
    for number, row in enumerate(batch.rows):
        try:
            check_layout(row)
        except BatchError as error:
            raise BatchError(f"row {number}: {error}") from error


def _check_values(batch: TrainBatch) -> None:
    for name in ("logprobs", "advantage", "weight"):
        if not np.isfinite(getattr(batch, name)).all():
            raise BatchError(f"{name} holds a value that is not finite")
    for name in OPTIONAL:
        given = getattr(batch, name)
        if given is not None and np.isinf(given).any():
            raise BatchError(f"{name} holds an infinite value")
    if (batch.weight < 0).any():
        raise BatchError("weight holds a negative share")
    if ((batch.rollout < 0) | (batch.rollout >= len(batch.rollout_ids))).any():
        raise BatchError(f"rollout names none of the {len(batch.rollout_ids)} rollouts")
    if batch.ages and len(batch.ages) != len(batch.rollout_ids):
        raise BatchError(f"{len(batch.ages)} ages for {len(batch.rollout_ids)} rollouts")


def _join[T: (np.int32, np.float32)](arrays: Sequence[NDArray[T]], dtype: type[T]) -> NDArray[T]:
    return np.concatenate([np.empty(0, dtype), *arrays]).astype(dtype)
