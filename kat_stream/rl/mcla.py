"""Monte-Carlo log-prob averaging (KAT-Coder-V2 eq. 11): the behaviour policy's log-probs from K repeated prefills.

Invariant: the average is a constant, so no gradient passes through it; and K repeats that are identical to the bit are
no independent samples: their benefit is None, never a number.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kat_stream.errors import DataError

Reduce = Literal["logprob_mean", "logmeanexp"]
Repeats = NDArray[np.float32] | NDArray[np.float64]
"""float[K, S]: log-probs of the same S tokens, K times, in nats."""


def average(repeats: Repeats, reduce: Reduce) -> NDArray[np.float32]:
    """float32[S]: mean of the log-probs (report), or log of the mean probability (unbiased for a noisy engine).

    `DataError` if there is no repeat or a value is not finite.
    """
    values = _checked(repeats)
    if reduce == "logprob_mean":
        return values.mean(0).astype(np.float32)
    return np.asarray(np.logaddexp.reduce(values, 0) - np.log(len(values)), np.float32)


def reduce_gap(repeats: Repeats) -> float:
    """Mean over tokens of logmeanexp - logprob_mean in nats, about var/2 * (1 - 1/K): what the choice costs a token."""
    values = _checked(repeats)
    return float(np.mean(np.logaddexp.reduce(values, 0) - np.log(len(values)) - values.mean(0)))


def variances(repeats: Repeats) -> NDArray[np.float64]:
    """float64[S]: unbiased variance of each token's log-prob over repeats; zeros for one repeat."""
    values = _checked(repeats)
    return np.asarray(values.var(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1]), np.float64)


def scaling(repeats: Repeats, k: int) -> float | None:
    """K * var_K / var_1 from R >= 2 K repeats: 1 if averaging K of them helps as much as it can.

    Means of R // K disjoint sets are compared. None if the repeats are identical: then nothing was sampled.
    """
    values = _checked(repeats)
    sets = len(values) // k
    if sets < 2:
        raise DataError(f"{len(values)} repeats make no two sets of {k}")
    if identical(values):
        return None
    means = values[: sets * k].reshape(sets, k, -1).mean(1)
    return float(k * means.var(0, ddof=1).mean() / values.var(0, ddof=1).mean())


def identical(repeats: Repeats) -> bool:
    """True if repeating changed nothing: the engine or its cache is deterministic for this co-batch."""
    return bool((repeats == repeats[:1]).all())


def _checked(repeats: Repeats) -> NDArray[np.float64]:
    if repeats.ndim != 2 or not len(repeats):
        raise DataError(f"repeats are {list(repeats.shape)}, expected [K, S] with K >= 1")
    if not np.isfinite(repeats).all():
        raise DataError("a repeated log-prob is not finite")
    return repeats.astype(np.float64)
