"""Supervised fine-tuning: weighted token cross entropy over the same trees.

Invariant: every token of a turn has the turn's weight and the shares of all tokens of a step sum to 1. A demonstration
gives its agent's stretches as turns of weight 1 and other stretches as turns of a smaller weight.
"""

from __future__ import annotations

import numpy as np
import torch

from kat_stream.rl.loss import Loss, LossInputs, LossOutput
from kat_stream.rl.settings import RatioConfig
from kat_stream.rl.units import Units, make_units
from kat_stream.trees.batch import TrainBatch


def sft_units(batch: TrainBatch, config: RatioConfig) -> Units:
    """One unit a token, with the weight of its turn; `config` is not looked at."""
    lengths = batch.lengths
    turns = len(lengths)
    per_turn = (batch.weight * lengths).astype(np.float32)
    return make_units("token", lengths, np.zeros(turns, np.int32), np.ones(turns, np.float32), per_turn)


def sft(inputs: LossInputs, config: RatioConfig) -> LossOutput:
    """-sum of weight * logp over tokens; advantages, behaviour log-probs and `config` are not looked at."""
    loss = -(inputs.weight[inputs.unit] * inputs.logp).sum()
    ones = torch.ones_like(inputs.length)
    return LossOutput(loss, ones, ones < 0, torch.zeros_like(inputs.logp, dtype=torch.bool))


LOSS = Loss(sft_units, sft)
