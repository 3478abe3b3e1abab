"""Averaged log-probs: 1/K of the variance for independent noise, a floor for shared noise, no claim without noise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kat_stream.errors import DataError
from kat_stream.rl.loss import LossInputs
from kat_stream.rl.mcla import average, identical, reduce_gap, scaling, variances
from kat_stream.rl.settings import RatioConfig
from kat_stream.rl.turn_ratio import turn_ratio

RNG = np.random.default_rng(0)
BASE = -RNG.uniform(0.1, 4, 3000)


def repeats(count: int, sd: float, shared: float = 0.0) -> np.ndarray:
    common = RNG.normal(0, shared, BASE.shape)
    return BASE + common + RNG.normal(0, sd, (count, len(BASE)))


def test_both_ways_of_averaging() -> None:
    values = np.log(np.array([[0.5, 0.1], [0.25, 0.1]]))
    assert average(values, "logprob_mean").tolist() == pytest.approx([np.log(0.5 * 0.25) / 2, np.log(0.1)])
    assert average(values, "logmeanexp").tolist() == pytest.approx([np.log(0.375), np.log(0.1)])
    assert average(values[:1], "logmeanexp").tolist() == pytest.approx(values[0].tolist())
    assert average(values, "logmeanexp").dtype == np.float32


@pytest.mark.parametrize("k", [2, 4, 8, 16])
def test_independent_noise_falls_as_one_over_k(k: int) -> None:
    assert scaling(repeats(64, 0.03), k) == pytest.approx(1.0, abs=0.05)


def test_noise_that_repeats_share_stays() -> None:
    """A cached prefix gives every repeat the same error: more repeats do not see it, and the floor remains."""
    found = repeats(64, 0.03, shared=0.03)
    error = average(found, "logprob_mean") - BASE
    assert error.var() == pytest.approx(0.03**2, rel=0.1)
    assert scaling(found, 8) == pytest.approx(1.0, abs=0.05)


def test_identical_repeats_claim_nothing() -> None:
    copies = np.repeat(repeats(1, 0.03), 8, axis=0)
    assert identical(copies)
    assert scaling(copies, 4) is None
    assert variances(copies).max() < 1e-30
    assert not identical(repeats(8, 0.03))


@pytest.mark.parametrize("k", [2, 8, 64])
def test_the_gap_between_the_two_is_half_the_variance(k: int) -> None:
    sd = 0.1
    assert reduce_gap(repeats(k, sd)) == pytest.approx(sd**2 / 2 * (1 - 1 / k), rel=0.08)


def test_the_probability_mean_is_the_unbiased_one() -> None:
    """Sampled from a noisy engine, an action's probability is the mean over noise; the mean log-prob is below it."""
    values = repeats(4096, 0.2)[:, :50]
    truth = BASE[:50] + 0.2**2 / 2
    assert np.abs(average(values, "logmeanexp") - truth).max() < 0.02
    assert (truth - average(values, "logprob_mean")).mean() == pytest.approx(0.02, abs=0.004)


def test_variances_are_unbiased() -> None:
    assert variances(repeats(5, 0.03)).mean() == pytest.approx(9e-4, rel=0.05)
    assert (variances(repeats(1, 0.03)) == 0).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [(np.zeros((0, 3)), r"\[0, 3\]"), (np.zeros(3), r"\[3\]"), (np.array([[0.0, np.nan]]), "not finite")],
)
def test_repeats_that_are_none_are_refused(values: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        average(values, "logprob_mean")
    with pytest.raises(DataError, match="make no two sets"):
        scaling(np.zeros((3, 2)), 2)


def test_independent_estimates_of_a_gradient_differ_by_one_over_k() -> None:
    """M3: the squared distance of two gradients, each against an average of K noisy prefills of the same tokens."""
    rng = np.random.default_rng(2)
    turns, size = 400, 6
    logp = torch.from_numpy(-rng.uniform(0.5, 3, turns * size)).requires_grad_()
    one = torch.ones(turns, dtype=torch.float64)
    plain = LossInputs(
        logp, logp.detach(), torch.arange(turns).repeat_interleave(size), size * one,
        torch.from_numpy(rng.standard_normal(turns)), one / turns,
    )  # fmt: skip
    config = RatioConfig(mask="none", clip_low=0.9, clip_high=9.0, dual_clip=None)

    def gradient(k: int) -> torch.Tensor:
        repeats = logp.detach().numpy() + rng.normal(0, 0.03, (k, turns * size))
        old = torch.from_numpy(average(repeats, "logprob_mean")).double()
        (found,) = torch.autograd.grad(turn_ratio(replace(plain, rollout_logp=old), config).loss, logp)
        return found

    far = {k: np.mean([float((gradient(k) - gradient(k)).square().sum()) for _ in range(8)]) for k in (1, 4, 16)}
    assert [k * far[k] / far[1] for k in (4, 16)] == pytest.approx([1, 1], abs=0.2)
