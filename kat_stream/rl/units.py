"""What one importance ratio spans: a token, a turn or a whole sequence (rollout); and how units are weighted.

Invariant: weights are normalised over the logical units of the whole optimizer step, before any packing, so neither
rows nor micro-batches change the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kat_stream.errors import BatchError
from kat_stream.rl.settings import Level


@dataclass(frozen=True, eq=False, slots=True)
class Units:
    """U units over the S sampled tokens of a step."""

    unit: NDArray[np.int64]
    """int64[S]: unit of each sampled token, turns one after the other."""
    length: NDArray[np.float64]
    """float64[U]: sampled tokens of the unit, before any mask."""
    advantage: NDArray[np.float64]
    """float64[U]."""
    weight: NDArray[np.float64]
    """float64[U]: share of the loss; they sum to 1 over the step."""


def make_units(
    level: Level,
    lengths: NDArray[np.int32],
    rollout: NDArray[np.int32],
    advantage: NDArray[np.float32],
    weight: NDArray[np.float32],
) -> Units:
    """Units of a step from its per-turn arrays (each [M]).

    At token level a turn's weight is divided evenly over its tokens; at sequence level weights add up and the
    advantage is their weighted mean. Raises `BatchError` if all weights are zero.
    """
    total = float(weight.sum(dtype=np.float64))
    if total <= 0:
        raise BatchError(f"the weights of {len(weight)} turns add up to {total:g}: nothing to learn from")
    share = weight.astype(np.float64) / total
    turn = np.repeat(np.arange(len(lengths)), lengths)
    if level == "token":
        return Units(
            np.arange(len(turn)), np.ones(len(turn)), advantage.astype(np.float64)[turn], (share / lengths)[turn]
        )
    if level == "turn":
        return Units(turn, lengths.astype(np.float64), advantage.astype(np.float64), share)
    return _sequences(turn, lengths, rollout, advantage, share)


def _sequences(
    turn: NDArray[np.int64],
    lengths: NDArray[np.int32],
    rollout: NDArray[np.int32],
    advantage: NDArray[np.float32],
    share: NDArray[np.float64],
) -> Units:
    _, owner = np.unique(rollout, return_inverse=True)
    weight = np.bincount(owner, share)
    scaled = np.bincount(owner, share * advantage)
    mean = np.divide(scaled, weight, out=np.zeros_like(weight), where=weight > 0)
    return Units(owner[turn], np.bincount(owner, lengths).astype(np.float64), mean, weight)
