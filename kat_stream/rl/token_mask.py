"""Mask only: drop tokens on which training and inference engine disagree, and weigh the others alike (GLM-5, SkyRL)."""

from __future__ import annotations

import torch
from torch import Tensor


def token_mask(k: Tensor, unit: Tensor, length: Tensor, low: float, high: float) -> Tensor:
    """float[S]: 1 where low <= k <= high, else 0."""
    return torch.where((k >= low) & (k <= high), torch.ones_like(k), 0.0)
