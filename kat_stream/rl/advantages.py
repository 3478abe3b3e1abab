"""Advantages of the rollouts of one group, from their rewards.

Invariant: advantages of a group sum to zero; a group whose rewards are all equal teaches nothing and gives None.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kat_stream.errors import DataError


def group_mean(rewards: ArrayLike) -> NDArray[np.float64] | None:
    """Reward minus the group's mean, float64[G] (Dr. GRPO, arXiv 2503.20783). None: all rewards are equal."""
    values = _finite(rewards)
    if len(values) == 0 or (values == values[0]).all():
        return None
    return np.asarray(values - values.mean(), np.float64)


def group_std(rewards: ArrayLike) -> NDArray[np.float64] | None:
    """`group_mean` over the group's population standard deviation (GRPO, arXiv 2402.03300)."""
    centred = group_mean(rewards)
    return None if centred is None else np.asarray(centred / centred.std(), np.float64)


Advantage = Callable[[ArrayLike], NDArray[np.float64] | None]

ADVANTAGES: dict[str, Advantage] = {"group_mean": group_mean, "group_std": group_std}


def turn_shares(rollout: ArrayLike) -> NDArray[np.float64]:
    """float64[M]: 1 / (turns of the turn's rollout), so that every rollout weighs the same whatever its length.

    `rollout` is int[M], the rollout of each trainable turn. Shares of 1 instead make every turn weigh the same.
    """
    _, inverse, counts = np.unique(np.asarray(rollout), return_inverse=True, return_counts=True)
    return np.asarray(1.0 / counts[inverse], np.float64)


def _finite(rewards: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(rewards, np.float64)
    if not np.isfinite(values).all():
        raise DataError(f"a group has the reward {values[~np.isfinite(values)][0]}")
    return values
