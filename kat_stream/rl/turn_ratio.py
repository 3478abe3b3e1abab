"""The clipped importance ratio of a unit: token (PPO), turn (KAT-Coder-V2 eq. 6-7) or sequence (GSPO).

    d_u = |T_u|^-p * sum over kept tokens of (logp - logp_old);  r_u = exp(d_u);  loss = -sum_u w_u * clipped(r_u, A_u)

Invariant: a unit is clipped or whole, never partly; a clipped unit gives a constant and no gradient; masked tokens
leave the sum but not |T_u|. Sums are taken before exp, so a unit must lie in one call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from kat_stream.errors import ConfigError
from kat_stream.rl.icepop import icepop
from kat_stream.rl.units import Level


@dataclass(frozen=True, kw_only=True, slots=True)
class RatioConfig:
    """Which ratio, and how far it may go. The report gives no numbers: the defaults are ours."""

    level: Level = "turn"
    length_exponent: float = 0.0
    """p: 0 product (report), 0.5 variance-flat, 1 geometric mean (GSPO)."""
    clip_low: float = 0.2
    clip_high: float = 0.2
    """Units with A > 0 stop at 1 + clip_high, with A < 0 at 1 - clip_low."""
    dual_clip: float | None = 3.0
    """Units with A < 0 stop at this ratio too; None: unbounded."""
    icepop_low: float = 0.5
    icepop_high: float = 5.0
    """Keep tokens with pi_train / pi_rollout in [icepop_low, icepop_high]."""
    denominator: Literal["rollout", "train"] = "rollout"
    """pi_old: the behaviour log-probs, or the training engine's own before the step."""

    def __post_init__(self) -> None:
        if self.level not in get_args(Level):
            raise ConfigError(f"level is {self.level!r}, expected one of {', '.join(get_args(Level))}")
        if not 0 <= self.clip_low < 1 or self.clip_high < 0:
            raise ConfigError(f"clip_low {self.clip_low} is not in [0, 1) or clip_high {self.clip_high} is negative")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ConfigError(f"dual_clip is {self.dual_clip}, expected more than 1")
        if not 0 <= self.icepop_low <= 1 <= self.icepop_high:
            raise ConfigError(f"icepop bounds [{self.icepop_low}, {self.icepop_high}] do not enclose 1")


@dataclass(frozen=True, eq=False, slots=True)
class LossInputs:
    """S sampled tokens of U whole units."""

    logp: Tensor
    """float[S], with gradient."""
    rollout_logp: Tensor
    """float[S], recorded while sampling."""
    unit: Tensor
    """int64[S]."""
    length: Tensor
    """float[U], before any mask."""
    advantage: Tensor
    """float[U]."""
    weight: Tensor
    """float[U], normalised over the step."""


@dataclass(frozen=True, eq=False, slots=True)
class LossOutput:
    loss: Tensor
    """Scalar: this call's share of the step's loss."""
    ratio: Tensor
    """float[U], detached."""
    clipped: Tensor
    """bool[U]."""
    masked: Tensor
    """bool[S]: tokens left out by IcePop."""


def turn_ratio(inputs: LossInputs, config: RatioConfig) -> LossOutput:
    """The loss above. With one optimizer step a batch, `denominator="train"` makes every ratio exactly 1."""
    old = inputs.logp.detach() if config.denominator == "train" else inputs.rollout_logp
    logp, kept = _filtered(inputs, config)
    delta = torch.where(kept, logp - old, 0.0)
    total = torch.zeros_like(inputs.length).index_add(0, inputs.unit, delta)
    log_ratio = total * inputs.length.pow(-config.length_exponent)
    ratio = log_ratio.detach().exp()
    over, under, dual = _bounds(ratio, inputs.advantage, config)
    clipped = over | under | dual
    # exp is taken only of units that have a gradient: another may overflow, and 0 * inf would poison the sum.
    idle = clipped | (inputs.weight == 0)
    live = torch.where(idle, torch.zeros_like(log_ratio), log_ratio).exp()
    limit = torch.full_like(ratio, 1 - config.clip_low).masked_fill(over, 1 + config.clip_high)
    if config.dual_clip is not None:
        limit = limit.masked_fill(dual, config.dual_clip)
    objective = torch.where(clipped, limit, live) * inputs.advantage
    return LossOutput(-(inputs.weight * objective).sum(), ratio, clipped, ~kept)


def _filtered(inputs: LossInputs, config: RatioConfig) -> tuple[Tensor, Tensor]:
    """Log-probs, and which of them are kept; their gradient is scaled by M(k) where the ratio does not hold k itself.

    Against the behaviour log-probs the ratio is already pi_train / pi_rollout: to weight by k again would square it.
    """
    scale = icepop(inputs.logp.detach(), inputs.rollout_logp, config.icepop_low, config.icepop_high)
    if config.denominator == "rollout":
        return inputs.logp, scale > 0
    fixed = inputs.logp.detach()
    return fixed + scale * (inputs.logp - fixed), scale > 0


def _bounds(ratio: Tensor, advantage: Tensor, config: RatioConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Units stopped at 1 + clip_high, at 1 - clip_low, at dual_clip; a ratio exactly on a bound is not clipped."""
    over = (advantage > 0) & (ratio > 1 + config.clip_high)
    under = (advantage < 0) & (ratio < 1 - config.clip_low)
    if config.dual_clip is None:
        return over, under, torch.zeros_like(over)
    return over, under, (advantage < 0) & (ratio > config.dual_clip)
