"""How much each turn weighs in the loss of a step, before the weights are normalised to sum to 1.

Invariant: weights are those of logical turns, before packing. `trajectory` is the report's: mean over a trajectory's
turns, then over trajectories, so a token of a long run weighs less. `global` gives every unit of the loss one weight.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kat_stream.rl.settings import Aggregation, Level


def turn_weights(
    rollout: ArrayLike, lengths: ArrayLike, *, aggregation: Aggregation, level: Level
) -> NDArray[np.float64]:
    """float64[M] of turns with `rollout` int[M] and `lengths` int[M] (sampled tokens).

    A global token is one of all sampled tokens of the step, a global turn one of all turns; sequences weigh the same
    either way.
    """
    if aggregation == "trajectory" or level == "sequence":
        _, inverse, counts = np.unique(np.asarray(rollout), return_inverse=True, return_counts=True)
        return np.asarray(1.0 / counts[inverse], np.float64)
    if level == "token":
        return np.asarray(lengths, np.float64)
    return np.ones(len(np.asarray(rollout)), np.float64)
