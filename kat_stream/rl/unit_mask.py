"""Whole units out: a unit stays if the geometric mean of its tokens' k lies in the band (Geo-RS, sequence masks).

Invariant: a unit is kept or dropped as a whole; at level `sequence` this is the sequence mask. Kept tokens weigh k.
"""

from __future__ import annotations

import torch
from torch import Tensor


def unit_mask(k: Tensor, unit: Tensor, length: Tensor, low: float, high: float) -> Tensor:
    """float[S]: k if exp(mean log k) of the unit is in [low, high], else 0. One NaN or inf drops its unit."""
    logs = torch.zeros(len(length), dtype=k.dtype, device=k.device).index_add(0, unit, k.log())
    mean = (logs / length.to(k.dtype)).exp()
    kept = (mean >= low) & (mean <= high)
    return torch.where(kept.index_select(0, unit), k, 0.0)
