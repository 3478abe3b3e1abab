"""IcePop: leave out tokens on which training and inference engine disagree (Ring-1T, arXiv 2510.18855).

Invariant: M(k) carries no gradient, and it is apart from the clipped ratio: k compares two engines on the same tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def icepop(train_logp: Tensor, rollout_logp: Tensor, low: float, high: float) -> Tensor:
    """M(k)[S] = k where low <= k <= high, else 0; k = pi_train / pi_rollout. NaN and inf give 0; detached."""
    with torch.no_grad():
        k = torch.exp(train_logp.double() - rollout_logp.double())
        inside = (k >= low) & (k <= high)
        return torch.where(inside, k, 0.0).to(train_logp.dtype)
