"""The clipped ratio, IcePop and SFT against formulas written out by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from kat_stream.env.plugins import load
from kat_stream.errors import BatchError, ConfigError
from kat_stream.rl.loss import LossInputs
from kat_stream.rl.masks import mismatch_scale
from kat_stream.rl.settings import RatioConfig
from kat_stream.rl.sft import LOSS, sft
from kat_stream.rl.turn_ratio import turn_ratio
from kat_stream.rl.units import Units, make_units
from kat_stream.trees import TurnTokens, make_batch

OPEN = {"mask_low": 0.0, "mask_high": math.inf}
"""IcePop keeps everything."""


def inputs_of(units: Units, logp: Tensor, rollout: Tensor) -> LossInputs:
    return LossInputs(
        logp,
        rollout,
        torch.from_numpy(units.unit),
        torch.from_numpy(units.length),
        torch.from_numpy(units.advantage),
        torch.from_numpy(units.weight),
    )


def case(seed: int, level: str = "turn", gap: float = 0.3) -> LossInputs:
    rng = np.random.default_rng(seed)
    turns = 30
    lengths = rng.integers(1, 6, turns).astype(np.int32)
    owner = np.sort(rng.integers(0, 12, turns)).astype(np.int32)
    advantage = rng.standard_normal(turns).astype(np.float32)
    weight = rng.uniform(0.1, 1, turns).astype(np.float32)
    units = make_units(level, lengths, owner, advantage, weight)  # type: ignore[arg-type]
    total = int(lengths.sum())
    rollout = torch.from_numpy(-rng.uniform(0.5, 3, total))
    logp = (rollout + torch.from_numpy(rng.normal(0, gap, total))).requires_grad_()
    return inputs_of(units, logp, rollout)


def by_hand(inputs: LossInputs, config: RatioConfig) -> tuple[float, list[float], list[bool]]:
    """Loss, gradient and clip set, unit by unit in plain Python: no tensors, no where."""
    logp, old = inputs.logp.tolist(), inputs.rollout_logp.tolist()
    gradient = [0.0] * len(logp)
    loss, clipped = 0.0, []
    for u in range(len(inputs.length)):
        tokens = [t for t in range(len(logp)) if int(inputs.unit[t]) == u]
        a, w = float(inputs.advantage[u]), float(inputs.weight[u])
        kept = [t for t in tokens if config.mask_low <= math.exp(logp[t] - old[t]) <= config.mask_high]
        scale = len(tokens) ** -config.length_exponent
        r = math.exp(scale * sum(logp[t] - old[t] for t in kept))
        value = min(r * a, min(max(r, 1 - config.clip_low), 1 + config.clip_high) * a)
        if a < 0 and config.dual_clip is not None:
            value = max(value, config.dual_clip * a)
        clipped.append(value != r * a)
        loss -= w * value
        for t in kept:
            if value == r * a:
                gradient[t] = -w * a * r * scale
    return loss, gradient, clipped


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("level", ["token", "turn", "sequence"])
@pytest.mark.parametrize("seed", range(4))
def test_loss_gradient_and_clip_set_match_the_formula(p: float, level: str, seed: int) -> None:
    bounds = {"clip_low": 0.05, "clip_high": 0.08, "dual_clip": 1.3, "mask_high": 1.6}
    config = RatioConfig(level=level, length_exponent=p, **bounds)  # type: ignore[arg-type]
    inputs = case(seed, level)
    output = turn_ratio(inputs, config)
    loss, gradient, clipped = by_hand(inputs, config)
    torch.autograd.backward(output.loss)
    assert output.loss.item() == pytest.approx(loss, abs=1e-12)
    assert output.clipped.tolist() == clipped
    assert inputs.logp.grad is not None
    assert torch.allclose(inputs.logp.grad, torch.tensor(gradient, dtype=torch.float64), rtol=0, atol=1e-12)
    assert 0 < sum(clipped) < len(clipped)


def test_finite_differences_agree() -> None:
    inputs = case(1, gap=0.05)
    config = RatioConfig(length_exponent=0.5, **OPEN)

    def loss(logp: Tensor) -> Tensor:
        return turn_ratio(replace(inputs, logp=logp), config).loss

    assert torch.autograd.gradcheck(loss, (inputs.logp,), eps=1e-6, atol=1e-6)


def test_one_token_turns_are_ppo() -> None:
    """|T| = 1 everywhere: turn, token and sequence level are the same PPO clip."""
    rng = np.random.default_rng(0)
    ones = np.ones(6, np.int32)
    advantage, weight = rng.standard_normal(6).astype(np.float32), np.ones(6, np.float32)
    logp, old = torch.from_numpy(rng.normal(-1, 0.5, 6)), torch.from_numpy(rng.normal(-1, 0.5, 6))
    ratio, a = (logp - old).exp(), torch.from_numpy(advantage.astype(np.float64))
    expected = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).mean()
    for level in ("token", "turn", "sequence"):
        units = make_units(level, ones, np.arange(6, dtype=np.int32), advantage, weight)  # type: ignore[arg-type]
        config = RatioConfig(level=level, dual_clip=None, **OPEN)  # type: ignore[arg-type]
        assert torch.allclose(turn_ratio(inputs_of(units, logp, old), config).loss, expected, atol=1e-14)


def test_geometric_sequence_is_gspo() -> None:
    inputs = case(5, "sequence", gap=0.1)
    config = RatioConfig(level="sequence", length_exponent=1.0, dual_clip=None, clip_low=3e-2, clip_high=4e-2, **OPEN)
    expected = torch.zeros((), dtype=torch.float64)
    for u in range(len(inputs.length)):
        s = (inputs.logp - inputs.rollout_logp)[inputs.unit == u].mean().exp()
        a = inputs.advantage[u]
        expected = expected - inputs.weight[u] * torch.minimum(s * a, s.clamp(0.97, 1.04) * a)
    assert torch.allclose(turn_ratio(inputs, config).loss, expected, atol=1e-14)


def test_a_ratio_exactly_on_a_bound_is_not_clipped() -> None:
    bound = math.exp(math.log(1.25))
    for advantage, ratio in itertools.product((1.0, -1.0), (bound, 0.75)):
        logp = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
        one = torch.ones(1, dtype=torch.float64)
        inputs = LossInputs(logp, 0 * one, torch.zeros(1, dtype=torch.int64), one, advantage * one, one)
        value = float(logp.detach().exp())
        output = turn_ratio(
            inputs, RatioConfig(clip_low=1 - value if value < 1 else 0.2, clip_high=0.0 + max(value - 1, 0))
        )
        assert not output.clipped.any()
        torch.autograd.backward(output.loss)
        assert logp.grad is not None
        assert logp.grad.item() == pytest.approx(-advantage * value)


def test_on_policy_ratio_is_one_to_the_bit() -> None:
    inputs = case(2)
    same = replace(inputs, rollout_logp=inputs.logp.detach())
    train = turn_ratio(inputs, RatioConfig(denominator="train", **OPEN))
    for output in (turn_ratio(same, RatioConfig()), train):
        assert (output.ratio == 1).all()
        assert not output.clipped.any()
    assert not (turn_ratio(inputs, RatioConfig(**OPEN)).ratio == 1).any()


def test_overflowing_ratios_leave_finite_gradients() -> None:
    inputs = case(3)
    logp = (inputs.logp.detach() + 500).requires_grad_()
    output = turn_ratio(replace(inputs, logp=logp), RatioConfig(**OPEN))
    assert output.clipped.all()
    torch.autograd.backward(output.loss)
    assert torch.isfinite(output.loss)
    assert logp.grad is not None
    assert (logp.grad == 0).all()


def test_units_without_weight_cannot_poison_the_sum() -> None:
    inputs = case(3)
    weight = torch.zeros_like(inputs.weight)
    logp = (inputs.logp.detach() + 500).requires_grad_()
    output = turn_ratio(replace(inputs, logp=logp, weight=weight), RatioConfig(dual_clip=None, **OPEN))
    torch.autograd.backward(output.loss)
    assert output.loss.item() == 0
    assert logp.grad is not None
    assert (logp.grad == 0).all()


def test_icepop_keeps_exactly_its_band() -> None:
    k = torch.tensor([0.49, 0.5, 1.0, 5.0, 5.01, math.nan, math.inf, 0.0], dtype=torch.float64)
    at = torch.arange(8)
    scale = mismatch_scale(k.log().requires_grad_(), torch.zeros_like(k), at, torch.ones(8), RatioConfig())
    expected = torch.tensor([0, 0.5, 1, 5, 0, 0, 0, 0], dtype=torch.float64)
    assert torch.allclose(scale, expected, atol=1e-15)
    assert not scale.requires_grad


def test_icepop_leaves_a_matching_engine_alone_and_gives_it_no_gradient() -> None:
    inputs = case(4)
    rollout = inputs.logp.detach().clone().requires_grad_()
    same = replace(inputs, rollout_logp=rollout)
    tight = RatioConfig(mask_low=1.0, mask_high=1.0, denominator="train")
    with_mask, without = turn_ratio(same, tight), turn_ratio(same, replace(tight, mask_low=0.0, mask_high=math.inf))
    assert with_mask.loss.item() == without.loss.item()
    assert not with_mask.masked.any()
    torch.autograd.backward(with_mask.loss)
    assert rollout.grad is None


def test_masked_tokens_leave_the_sum_but_not_the_length() -> None:
    one = torch.ones(1, dtype=torch.float64)
    logp = torch.tensor([-1.0, -1.0, 4.0], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-1.1, -1.1, -1.0], dtype=torch.float64)
    inputs = LossInputs(logp, old, torch.zeros(3, dtype=torch.int64), 3 * one, one, one)
    output = turn_ratio(inputs, RatioConfig(length_exponent=1.0))
    assert output.masked.tolist() == [False, False, True]
    assert output.ratio.item() == pytest.approx(math.exp(0.2 / 3))


def test_units_share_the_loss_at_every_level() -> None:
    lengths, owner = np.array([2, 3, 1], np.int32), np.array([0, 0, 1], np.int32)
    advantage, weight = np.array([1, 1, -2], np.float32), np.array([0.5, 0.5, 1], np.float32)
    token = make_units("token", lengths, owner, advantage, weight)
    sequence = make_units("sequence", lengths, owner, advantage, weight)
    assert token.weight.tolist() == pytest.approx([1 / 8, 1 / 8, 1 / 12, 1 / 12, 1 / 12, 1 / 2])
    assert sequence.unit.tolist() == [0, 0, 0, 0, 0, 1]
    assert sequence.weight.tolist() == [0.5, 0.5]
    assert sequence.advantage.tolist() == [1, -2]
    assert sequence.length.tolist() == [5, 1]
    with pytest.raises(BatchError, match="nothing to learn from"):
        make_units("turn", lengths, owner, advantage, 0 * weight)


def test_sft_is_weighted_cross_entropy_over_tokens(turn: Callable[..., TurnTokens]) -> None:
    turns = [turn("a", [0], [1, 2]), turn("b", [1], [1, 2, 3])]
    batch = make_batch(turns, rollout=[0, 0], advantage=[1, 1], weight=[1.0, 0.1], rollout_ids=["r"], budget_tokens=99)
    logp = torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0], dtype=torch.float64)
    output = sft(inputs_of(LOSS.units(batch, RatioConfig()), logp, torch.zeros(5)), RatioConfig())
    assert output.loss.item() == pytest.approx((3 + 0.1 * 12) / (2 + 0.1 * 3))


@pytest.mark.parametrize(
    "bad", [{"level": "turns"}, {"clip_low": 1.0}, {"clip_high": -0.1}, {"dual_clip": 1.0}, {"mask_low": 2.0}]
)
def test_a_meaningless_ratio_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad)).split("_")[0]):
        RatioConfig(**bad)  # type: ignore[arg-type]


def test_an_unknown_loss_is_refused_with_the_known_ones() -> None:
    assert load("kat_stream.losses", "sft") is LOSS
    with pytest.raises(ConfigError, match="no 'grpo'.*known: sft, static_weights, turn_ratio"):
        load("kat_stream.losses", "grpo")


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("level", ["token", "turn", "sequence"])
def test_the_token_surrogate_of_fused_kernels_has_the_same_gradient(p: float, level: str) -> None:
    """G1: -A exp(sg[d] + |T|^-p (logp - sg logp)) a token, summed over a unit that is not clipped."""
    config = RatioConfig(level=level, length_exponent=p, clip_low=0.2, clip_high=0.2, **OPEN)  # type: ignore[arg-type]
    inputs = case(9, level)
    output = turn_ratio(inputs, config)
    (direct,) = torch.autograd.grad(output.loss, inputs.logp)
    scale = inputs.length.pow(-p)[inputs.unit]
    fixed = (scale * (inputs.logp - inputs.rollout_logp)).detach()
    d = torch.zeros_like(inputs.length).index_add(0, inputs.unit, fixed)[inputs.unit]
    token = torch.exp(d + scale * (inputs.logp - inputs.logp.detach()))
    share = (inputs.weight * inputs.advantage * ~output.clipped)[inputs.unit]
    (surrogate,) = torch.autograd.grad(-(share * token).sum(), inputs.logp)
    assert torch.allclose(direct, surrogate, rtol=0, atol=1e-12)
    assert (direct != 0).any() and (direct == 0).any()


@pytest.mark.parametrize("level", ["turn", "sequence", "token"])
def test_a_unit_without_advantage_cannot_poison_the_sum(level: str) -> None:
    """exp of its log-ratio overflows; its share of loss and gradient is 0, as it is for one that does not."""
    inputs = case(6, level)
    silent = int(inputs.advantage.argmin())
    advantage = inputs.advantage.clone()
    advantage[silent] = 0
    far = torch.where(inputs.unit == silent, 800.0, 0.0)
    config = RatioConfig(level=level, mask="none", dual_clip=None)  # type: ignore[arg-type]
    found = []
    for gap in (0 * far, far):
        logp = (inputs.logp.detach() + gap).requires_grad_()
        output = turn_ratio(replace(inputs, logp=logp, advantage=advantage), config)
        found.append((output.loss.item(), *torch.autograd.grad(output.loss, logp)))
    assert math.isfinite(found[1][0])
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_bound_that_overflows_still_clips(advantage: float) -> None:
    """clip_band sqrt_length: over 7000 tokens the dual clip's ceiling is e^92, more than a float32 holds."""
    tokens = 7000
    logp = torch.full((tokens,), -0.95, requires_grad=True)
    one = torch.ones(1)
    inputs = LossInputs(
        logp, torch.full((tokens,), -1.0), torch.zeros(tokens, dtype=torch.int64), tokens * one, advantage * one, one
    )
    output = turn_ratio(inputs, RatioConfig(clip_band="sqrt_length", **OPEN))
    assert output.clipped.tolist() == [True]
    torch.autograd.backward(output.loss)
    assert logp.grad is not None
    assert (logp.grad == 0).all()
