"""One constant weight a token (the report's form of tree training): linear in the log-probs, so kernels can fuse it.

    loss = -sum_t w_u * A_u * |T_u|^-p * M(k_t) * logp_t

Invariant: it is used only where it is exact, at ratio 1; off-policy it would be silently wrong (49 % of the gradient on
a small tree), so that is an `OffPolicyError`.
"""

from __future__ import annotations

import torch

from kat_stream.errors import OffPolicyError
from kat_stream.rl.loss import Loss, LossInputs, LossOutput, ratio_units
from kat_stream.rl.settings import RatioConfig
from kat_stream.rl.turn_ratio import compared

TOLERANCE_NATS = 1e-4
"""Largest log-ratio of a unit that still counts as on-policy: the relative error of its gradient."""


def static_weights(inputs: LossInputs, config: RatioConfig) -> LossOutput:
    """The loss above; its value differs from `turn_ratio` by a constant, its gradient does not.

    `OffPolicyError` if a unit's ratio is not 1.
    """
    old, scale = compared(inputs, config)
    delta = torch.where(scale > 0, inputs.logp.detach() - old, 0.0)
    gaps = torch.zeros_like(inputs.length).index_add(0, inputs.unit, delta).abs()
    if not bool((gaps <= TOLERANCE_NATS).all()):
        raise OffPolicyError(
            f"static weights are exact only on-policy, but a log-ratio is {float(gaps.max()):.3g} nats; "
            "use the loss turn_ratio, or denominator = train"
        )
    per_unit = -inputs.weight * inputs.advantage * inputs.length.pow(-config.length_exponent)
    weights = per_unit.index_select(0, inputs.unit) * scale
    ones = torch.ones_like(inputs.length)
    return LossOutput((weights * inputs.logp).sum(), ones, ones < 0, scale == 0)


LOSS = Loss(ratio_units, static_weights)
