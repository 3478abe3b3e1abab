"""The losses, by the name that a configuration uses: how each forms its units, and the loss itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kat_stream.rl.sft import sft, sft_units
from kat_stream.rl.turn_ratio import LossInputs, LossOutput, RatioConfig, turn_ratio
from kat_stream.rl.units import Units, make_units
from kat_stream.trees.batch import TrainBatch


@dataclass(frozen=True, slots=True)
class Loss:
    units: Callable[[TrainBatch, RatioConfig], Units]
    """Units of the whole step, before packing."""
    value: Callable[[LossInputs, RatioConfig], LossOutput]
    """Share of the step's loss of some whole units."""


def _ratio_units(batch: TrainBatch, config: RatioConfig) -> Units:
    return make_units(config.level, batch.lengths, batch.rollout, batch.advantage, batch.weight)


def _sft_units(batch: TrainBatch, config: RatioConfig) -> Units:
    return sft_units(batch.lengths, batch.weight)


LOSSES: dict[str, Loss] = {
    "turn_ratio": Loss(_ratio_units, turn_ratio),
    "sft": Loss(_sft_units, sft),
}
