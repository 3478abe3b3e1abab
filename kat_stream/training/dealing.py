"""Micro-batches to ranks by predicted cost.

Invariant: what is dealt is contiguous, so neighbours in the plan stay together, and the dearest rank is as cheap as
contiguous shares allow.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kat_stream.trees.batch import TrainBatch

PAIRS_A_TOKEN = 1000.0
"""Pairs of attending tokens that cost as much as one token does elsewhere in the model."""


def deal(costs: Sequence[float], ranks: int) -> NDArray[np.int64]:
    """int64[len(costs)]: a rank for each micro-batch, contiguous, so that the dearest rank is as cheap as can be."""
    low, high = max(costs, default=0.0), float(sum(costs))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if _fill(costs, middle).max(initial=0) < ranks else (middle, high)
    return _fill(costs, high)


def _fill(costs: Sequence[float], most: float) -> NDArray[np.int64]:
    """Ranks filled one after the other, none beyond `most` (but for rounding)."""
    chosen = np.zeros(len(costs), np.int64)
    rank, load = 0, 0.0
    for number, cost in enumerate(costs):
        if load + cost > most * (1 + 1e-9):
            rank, load = rank + 1, 0.0
        chosen[number], load = rank, load + cost
    return chosen


def predicted_cost(batch: TrainBatch, rows: Sequence[int]) -> float:
    """Of running some rows, in tokens: unique tokens, and pairs that attend."""
    return float(sum(len(batch.rows[row]) + batch.rows[row].pos.sum() / PAIRS_A_TOKEN for row in rows))
