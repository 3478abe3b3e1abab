"""On-policy distillation in policy-gradient form: the reverse KL to a teacher, on the policy's own samples.

    loss = -sum_t w_t * M(k_t) * clip(sg[log pi_T(y_t) - log pi(y_t)], +-R) * log pi(y_t)

Invariant: the teacher's signal is a constant. (The mean of logp - logp_T as a direct loss has an expected gradient of
zero: the teacher drops out.) Tokens without a teacher, NaN, give nothing; teacher equal to policy gives exactly zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kat_stream.errors import BatchError
from kat_stream.rl.loss import LossInputs
from kat_stream.rl.masks import mismatch_scale
from kat_stream.rl.settings import DistillationConfig, RatioConfig


@dataclass(frozen=True, eq=False, slots=True)
class Distilled:
    loss: Tensor
    """Scalar, without the coefficient: this call's share."""
    counts: Mapping[str, Tensor]
    """Sampled tokens that a teacher knows, whose signal was clipped, and that the mask leaves out (of those known)."""


def distillation(inputs: LossInputs, ratio: RatioConfig, config: DistillationConfig) -> Distilled:
    """`BatchError` if the batch has no teacher's log-probs."""
    teacher = inputs.teacher_logp
    if teacher is None:
        raise BatchError("distillation is on, but the batch holds no teacher's log-probs")
    policy = inputs.logp.detach()
    known = ~teacher.isnan()
    gap = torch.where(known, teacher - policy, 0.0)
    signal = gap.clamp(-config.clip, config.clip)
    scale = mismatch_scale(policy, inputs.rollout_logp, inputs.unit, inputs.length, ratio)
    counts = {
        "distillation_known": known.sum(),
        "distillation_clipped": (signal != gap).sum(),
        "distillation_masked": (known & (scale == 0)).sum(),
    }
    return Distilled(-(inputs.token_weight * scale * signal * inputs.logp).sum(), counts)
