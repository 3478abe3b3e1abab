"""What a loss is told by the configuration. No torch, so that a configuration is checked before anything heavy loads.

Invariant: a settings object that exists is meaningful; each refuses with a `ConfigError` that names the key and what it
may be. The report gives no numbers for clips, bands and coefficients: the defaults are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from kat_stream.errors import ConfigError

Level = Literal["token", "turn", "sequence"]
Denominator = Literal["rollout", "train"]
Aggregation = Literal["trajectory", "global"]
ClipBand = Literal["constant", "sqrt_length"]
MaskName = Literal["icepop", "truncated", "token", "unit", "none"]
Divergence = Literal["k1", "k2", "k3"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RatioConfig:
    """Which ratio, how far it may go, and which tokens are left out of it."""

    level: Level = "turn"
    length_exponent: float = 0.0
    """p: 0 product (report), 0.5 variance-flat, 1 geometric mean (GSPO)."""
    clip_low: float = 0.2
    clip_high: float = 0.2
    """Units with A > 0 stop at 1 + clip_high, with A < 0 at 1 - clip_low."""
    clip_band: ClipBand = "constant"
    """`sqrt_length`: the logarithms of all bounds grow with sqrt(|T|), as noise does (FSPO, arXiv 2509.09177)."""
    dual_clip: float | None = 3.0
    """Units with A < 0 stop at this ratio too; None: unbounded."""
    denominator: Denominator = "rollout"
    """pi_old: the behaviour log-probs, or the training engine's own before the step (then the mask weighs tokens)."""
    mask: MaskName = "icepop"
    """A name in `rl.masks.MASKS`: what becomes of tokens on which training and inference engine disagree."""
    mask_low: float = 0.5
    mask_high: float = 5.0
    """Band of k = pi_train / pi_rollout; `truncated` uses the upper bound alone."""

    def __post_init__(self) -> None:
        for name, choices in (("level", Level), ("denominator", Denominator), ("clip_band", ClipBand)):
            one_of(name, getattr(self, name), choices)
        one_of("mask", self.mask, MaskName)
        if self.length_exponent not in (0.0, 0.5, 1.0):
            raise ConfigError(f"length_exponent is {self.length_exponent}, expected 0, 0.5 or 1")
        if not 0 <= self.clip_low < 1 or self.clip_high < 0:
            raise ConfigError(f"clip_low {self.clip_low} is not in [0, 1) or clip_high {self.clip_high} is negative")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ConfigError(f"dual_clip is {self.dual_clip}, expected more than 1")
        if not 0 <= self.mask_low <= 1 <= self.mask_high:
            raise ConfigError(f"mask_low {self.mask_low} and mask_high {self.mask_high} do not enclose 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillationConfig:
    """Learning from a teacher's log-probs of the policy's own samples."""

    coefficient: float = 0.0
    """Added to the loss with this weight; 0: off, and then the loss is the same to the bit."""
    clip: float = 5.0
    """Largest |log pi_T - log pi| of one token, in nats."""

    def __post_init__(self) -> None:
        if self.coefficient < 0 or self.clip <= 0:
            raise ConfigError(
                f"distillation: coefficient {self.coefficient} is negative or clip {self.clip} is not > 0"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class PenaltyConfig:
    """What keeps the policy near a reference and away from certainty."""

    kl_coefficient: float = 0.0
    kl_estimator: Divergence = "k3"
    entropy_coefficient: float = 0.0

    def __post_init__(self) -> None:
        one_of("kl_estimator", self.kl_estimator, Divergence)
        if self.kl_coefficient < 0 or self.entropy_coefficient < 0:
            raise ConfigError(f"kl_coefficient {self.kl_coefficient} or entropy_coefficient is negative")


def one_of(name: str, value: str, choices: Any) -> None:
    """`ConfigError` unless `value` is one of a Literal's."""
    if value not in get_args(choices):
        raise ConfigError(f"{name} is {value!r}, expected one of {', '.join(get_args(choices))}")
