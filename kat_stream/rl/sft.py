"""Supervised fine-tuning: weighted token cross entropy over the same trees.

Invariant: every token of a turn has the turn's weight and the shares of all tokens of a step sum to 1. A demonstration
gives its agent's stretches as turns of weight 1 and other stretches as turns of a smaller weight.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from kat_stream.rl.turn_ratio import LossInputs, LossOutput, RatioConfig
from kat_stream.rl.units import Units, make_units


def sft_units(lengths: NDArray[np.int32], weight: NDArray[np.float32]) -> Units:
    """One unit a token; `weight` float32[M] is that of each token of the turn."""
    turns = len(lengths)
    per_turn = (weight * lengths).astype(np.float32)
    return make_units("token", lengths, np.zeros(turns, np.int32), np.ones(turns, np.float32), per_turn)


def sft(inputs: LossInputs, config: RatioConfig) -> LossOutput:
    """-sum of weight * logp over tokens; advantages, behaviour log-probs and `config` are not looked at."""
    loss = -(inputs.weight[inputs.unit] * inputs.logp).sum()
    ones = torch.ones_like(inputs.length)
    return LossOutput(loss, ones, ones < 0, torch.zeros_like(inputs.logp, dtype=torch.bool))
