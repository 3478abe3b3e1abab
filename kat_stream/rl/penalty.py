"""KL to a frozen reference and an entropy bonus, per sampled token of each turn.

Invariant: a token that several turns sampled, or a position where they part, counts once for each turn (its path
multiplicity), never once for its tree node; weights are the units', divided evenly over their tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kat_stream.errors import BatchError
from kat_stream.rl.loss import LossInputs
from kat_stream.rl.settings import Divergence


def kl(inputs: LossInputs, estimator: Divergence) -> Tensor:
    """Scalar: the weighted mean KL(pi || reference) of this call's tokens, from samples.

    k1 = log r, unbiased; k2 = (log r)^2 / 2; k3 = 1/r - 1 + log r with r = pi / reference (Schulman 2020). k1 as a
    direct loss would have an expected gradient of zero, so its gradient is the policy-gradient form, as k2's is.
    """
    if inputs.reference_logp is None:
        raise BatchError("a KL penalty needs the reference's log-probs")
    # A token without weight may be as odd as it likes: exp of its gap may overflow, and 0 * inf would poison the sum.
    gap = torch.where(inputs.token_weight == 0, 0.0, inputs.logp - inputs.reference_logp)
    if estimator == "k1":
        fixed = gap.detach()
        value = fixed * (1 + inputs.logp - inputs.logp.detach())
    elif estimator == "k2":
        value = gap.square() / 2
    else:
        value = (-gap).exp() - 1 + gap
    return (inputs.token_weight * value).sum()


def entropy(inputs: LossInputs) -> Tensor:
    """Scalar: the weighted mean entropy of the next-token distributions of this call's tokens, in nats."""
    if inputs.entropy is None:
        raise BatchError("an entropy bonus needs the entropies of the next-token distributions")
    return (inputs.token_weight * inputs.entropy).sum()
