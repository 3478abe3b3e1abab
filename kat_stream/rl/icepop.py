"""IcePop: weigh tokens by how training and inference engine agree, and drop them outside a band (arXiv 2510.18855).

Invariant: M(k) carries no gradient, and it is apart from the clipped ratio: k compares two engines on the same tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def icepop(k: Tensor, unit: Tensor, length: Tensor, low: float, high: float) -> Tensor:
    """M(k)[S] = k where low <= k <= high, else 0. NaN and inf give 0."""
    return torch.where((k >= low) & (k <= high), k, 0.0)
