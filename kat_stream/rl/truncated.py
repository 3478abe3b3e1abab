"""Truncated importance sampling (TIS): weigh tokens by how training and inference engine agree, up to a bound.

Invariant: no token is left out; only one without a number gets no weight.
"""

from __future__ import annotations

import torch
from torch import Tensor


def truncated(k: Tensor, unit: Tensor, length: Tensor, low: float, high: float) -> Tensor:
    """float[S]: min(k, high); NaN gives 0."""
    return torch.where(k.isnan(), 0.0, k.clamp(max=high))
