"""The clipped importance ratio of a unit: token (PPO), turn (KAT-Coder-V2 eq. 6-7) or sequence (GSPO).

    d_u = |T_u|^-p * sum over kept tokens of (logp - logp_old);  r_u = exp(d_u);  loss = -sum_u w_u * clipped(r_u, A_u)

Invariant: a unit is clipped or whole, never partly; a clipped unit gives a constant and no gradient; masked tokens
leave the sum but not |T_u|. Sums are taken before exp, so a unit must lie in one call; bounds are compared as
logarithms, for over a long turn exp overflows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kat_stream.rl.loss import Loss, LossInputs, LossOutput, ratio_units
from kat_stream.rl.masks import mismatch_scale
from kat_stream.rl.settings import RatioConfig


@dataclass(frozen=True, eq=False, slots=True)
class _Bounds:
    """Each [U]: whether a ratio stops, and the logarithm of where."""

    over: Tensor
    under: Tensor
    dual: Tensor
    limit: Tensor


def turn_ratio(inputs: LossInputs, config: RatioConfig) -> LossOutput:
    """The loss above. With one optimizer step a batch, `denominator="train"` makes every ratio exactly 1."""
    old, scale = compared(inputs, config)
    kept, fixed = scale > 0, inputs.logp.detach()
    # The scale multiplies the gradient of its token and leaves the value alone.
    delta = torch.where(kept, fixed + scale * (inputs.logp - fixed) - old, 0.0)
    total = torch.zeros_like(inputs.length).index_add(0, inputs.unit, delta)
    log_ratio = total * inputs.length.pow(-config.length_exponent)
    bounds = _bounds(log_ratio.detach(), inputs.advantage, inputs.length, config)
    clipped = bounds.over | bounds.under | bounds.dual
    # exp is taken only of units that have a gradient: another may overflow, and 0 * inf would poison the sum.
    idle = clipped | (inputs.weight == 0) | (inputs.advantage == 0)
    live = torch.where(idle, torch.zeros_like(log_ratio), log_ratio).exp()
    objective = torch.where(clipped, bounds.limit.exp(), live) * inputs.advantage
    return LossOutput(-(inputs.weight * objective).sum(), log_ratio.detach().exp(), clipped, ~kept)


def compared(inputs: LossInputs, config: RatioConfig) -> tuple[Tensor, Tensor]:
    """(log-probs that the policy's are divided by, scale of each token's gradient: 0 leaves it out), each [S].

    With the behaviour policy below, the ratio already is pi_train / pi_rollout: to weight by k again would square it.
    """
    prox = inputs.logp.detach() if inputs.prox_logp is None else inputs.prox_logp
    single = config.denominator == "rollout"
    against = inputs.logp.detach() if single else prox
    scale = mismatch_scale(against, inputs.rollout_logp, inputs.unit, inputs.length, config)
    if single:
        return inputs.rollout_logp, (scale > 0).to(scale.dtype)
    return prox, scale


def _bounds(log_ratio: Tensor, advantage: Tensor, length: Tensor, config: RatioConfig) -> _Bounds:
    """A ratio exactly on a bound is not clipped."""
    power = length.sqrt() if config.clip_band == "sqrt_length" else torch.ones_like(length)
    high, low = power * math.log1p(config.clip_high), power * math.log1p(-config.clip_low)
    over = (advantage > 0) & (log_ratio > high)
    under = (advantage < 0) & (log_ratio < low)
    dual = torch.zeros_like(over)
    limit = torch.where(over, high, low)
    if config.dual_clip is not None:
        ceiling = power * math.log(config.dual_clip)
        dual = (advantage < 0) & (log_ratio > ceiling)
        limit = torch.where(dual, ceiling, limit)
    return _Bounds(over, under, dual, limit)


LOSS = Loss(ratio_units, turn_ratio)
