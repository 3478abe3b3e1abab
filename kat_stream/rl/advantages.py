"""Advantages of the rollouts of one group, from their rewards.

Invariant: advantages of a baseline's members sum to zero; members whose rewards are all equal, up to the rounding of
sums, teach nothing and give None (NaN in `grouped`). Rewards of different scaffolds have different scales, so each key
has a baseline of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kat_stream.errors import DataError

ROUNDING = 1e-9
"""Rewards no further apart, of the largest or of 1, are equal: 0.1 + 0.2 is 0.3."""


def group_mean(rewards: ArrayLike) -> NDArray[np.float64] | None:
    """Reward minus the group's mean, float64[G] (Dr. GRPO, arXiv 2503.20783). None: all rewards are equal."""
    values = _finite(rewards)
    if len(values) == 0 or np.ptp(values) <= ROUNDING * max(1.0, float(np.abs(values).max())):
        return None
    return np.asarray(values - values.mean(), np.float64)


def group_std(rewards: ArrayLike) -> NDArray[np.float64] | None:
    """`group_mean` over the group's population standard deviation (GRPO, arXiv 2402.03300)."""
    centred = group_mean(rewards)
    return None if centred is None else np.asarray(centred / centred.std(), np.float64)


def leave_one_out(rewards: ArrayLike) -> NDArray[np.float64] | None:
    """Reward minus the mean of the others' (RLOO, arXiv 2402.14740): `group_mean` * G / (G - 1)."""
    centred = group_mean(rewards)
    return None if centred is None else np.asarray(centred * (len(centred) / (len(centred) - 1)), np.float64)


Advantage = Callable[[ArrayLike], NDArray[np.float64] | None]

ADVANTAGES: dict[str, Advantage] = {
    "group_mean": group_mean,
    "group_std": group_std,
    "leave_one_out": leave_one_out,
}


def grouped(rewards: ArrayLike, keys: Sequence[Hashable], rule: Advantage) -> NDArray[np.float64]:
    """float64[G]: `rule` over the members of each key, (task, scaffold); NaN where a key's rewards are all equal."""
    values = _finite(rewards)
    result = np.full(len(values), np.nan)
    for key in dict.fromkeys(keys):
        members = np.array([other == key for other in keys])
        found = rule(values[members])
        if found is not None:
            result[members] = found
    return result


def _finite(rewards: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(rewards, np.float64)
    if not np.isfinite(values).all():
        raise DataError(f"a group has the reward {values[~np.isfinite(values)][0]}")
    return values
