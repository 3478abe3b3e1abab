"""The masks against disagreement of training and inference engine, by the name that a configuration uses.

Invariant: a mask is a constant: it has no gradient; 0 means that the token is left out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kat_stream.rl.icepop import icepop
from kat_stream.rl.settings import MaskName, RatioConfig
from kat_stream.rl.token_mask import token_mask
from kat_stream.rl.truncated import truncated
from kat_stream.rl.unit_mask import unit_mask

Mask = Callable[[Tensor, Tensor, Tensor, float, float], Tensor]
"""(k float64[S], unit int64[S], length float[U], low, high) -> scale float64[S]."""


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
        # inf would turn a unit that counts for nothing, weight or signal 0, into NaN.
        return scale.clamp(max=torch.finfo(train.dtype).max).to(train.dtype)
