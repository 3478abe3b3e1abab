"""What one optimizer update learns from, when the groups of a step are shared out to several.

Invariant: a tree, and rows that a unit joins, lie inside one update; every turn with a weight is in exactly one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kat_stream.rl.units import Units
from kat_stream.training.rows import joined_rows
from kat_stream.trees.batch import TrainBatch, take_rows


@dataclass(eq=False, slots=True)
class Share:
    batch: TrainBatch
    units: Units
    """Of this batch alone: weights sum to 1 over the update."""
    proximal: NDArray[np.float64] | None = None
    """float64[sampled tokens of the batch]: log-probs before the first update, of what this process runs; None:
    this is it."""


def split(batch: TrainBatch, units: Units, count: int) -> list[TrainBatch]:
    """At most `count` batches of about as many sets of rows; one that has only turns without weight is left out."""
    sets = joined_rows(batch, units)
    chosen = np.array_split(np.arange(len(sets)), count)
    parts = [take_rows(batch, [row for number in some for row in sets[number]]) for some in chosen if len(some)]
    return [part for part in parts if part.weight.any()]
