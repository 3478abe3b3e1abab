"""The masks against disagreement of training and inference engine, by the name that a configuration uses.

Invariant: a mask is a constant: it has no gradient; 0 means that the token is left out. It compares two engines on the
same tokens, and is apart from the clipped ratio.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kat_stream.rl.settings import MaskName, RatioConfig

Mask = Callable[[Tensor, Tensor, Tensor, float, float], Tensor]
"""(k float64[S], unit int64[S], length float[U], low, high) -> scale float64[S]."""


def icepop(k: Tensor, unit: Tensor, length: Tensor, low: float, high: float) -> Tensor:
    """IcePop (arXiv 2510.18855): k in the band, 0 outside. NaN and inf give 0."""
    return torch.where((k >= low) & (k <= high), k, 0.0)


def truncated(k: Tensor, unit: Tensor, length: Tensor, low: float, high: float) -> Tensor:
    """Truncated importance sampling: min(k, high); only NaN gives 0."""
    return torch.where(k.isnan(), 0.0, k.clamp(max=high))


def token_mask(k: Tensor, unit: Tensor, length: Tensor, low: float, high: float) -> Tensor:
    """1 in the band, 0 outside (GLM-5, SkyRL)."""
    return torch.where((k >= low) & (k <= high), torch.ones_like(k), 0.0)


def unit_mask(k: Tensor, unit: Tensor, length: Tensor, low: float, high: float) -> Tensor:
    """k if the geometric mean of the unit's k lies in the band, else 0 for all of it (Geo-RS, sequence masks).

    One NaN or inf drops its unit.
    """
    logs = torch.zeros(len(length), dtype=k.dtype, device=k.device).index_add(0, unit, k.log())
    mean = (logs / length.to(k.dtype)).exp()
    kept = (mean >= low) & (mean <= high)
    return torch.where(kept.index_select(0, unit), k, 0.0)


def no_mask(k: Tensor, unit: Tensor, length: Tensor, low: float, high: float) -> Tensor:
    """Every token with weight 1."""
    return torch.ones_like(k)


MASKS: dict[MaskName, Mask] = {
    "icepop": icepop,
    "truncated": truncated,
    "token": token_mask,
    "unit": unit_mask,
    "none": no_mask,
}


def mismatch_scale(train: Tensor, rollout: Tensor, unit: Tensor, length: Tensor, config: RatioConfig) -> Tensor:
    """M(k) of each token as the configuration says, k = exp(train - rollout); float[S], finite, detached."""
    with torch.no_grad():
        k = torch.exp(train.double() - rollout.double())
        scale = MASKS[config.mask](k, unit, length, config.mask_low, config.mask_high)
        # inf would turn a unit that counts for nothing, weight or signal 0, into NaN; 0 would leave the token out.
        info = torch.finfo(train.dtype)
        return torch.where(scale > 0, scale.clamp(info.tiny, info.max), 0.0).to(train.dtype)
