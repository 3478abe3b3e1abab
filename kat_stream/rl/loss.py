"""What goes into a loss, what comes out, and what a loss is: how it forms its units, and its value.

Invariant: a loss sees whole units and its value is their share of the step's loss, so shares of disjoint units add up.
`LossInputs` are S sampled tokens of U units; all floats share one dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from kat_stream.rl.settings import RatioConfig
from kat_stream.rl.units import Units, make_units
from kat_stream.trees.batch import TrainBatch


@dataclass(frozen=True, eq=False, slots=True)
class LossInputs:
    """S sampled tokens of U whole units."""

    logp: Tensor
    """float[S], with gradient."""
    rollout_logp: Tensor
    """float[S], recorded while sampling, or their average over repeated prefills (MCLA)."""
    unit: Tensor
    """int64[S]."""
    length: Tensor
    """float[U], before any mask."""
    advantage: Tensor
    """float[U]."""
    weight: Tensor
    """float[U], normalised over the step."""
    prox_logp: Tensor | None = None
    """float[S]: the training engine's before the first optimizer step on these tokens; None: this is the first."""
    teacher_logp: Tensor | None = None
    """float[S], NaN where a token has no teacher."""
    reference_logp: Tensor | None = None
    """float[S] under the frozen reference."""
    entropy: Tensor | None = None
    """float[S] of the whole next-token distribution, in nats, with gradient."""

    @property
    def token_weight(self) -> Tensor:
        """float[S]: the unit's weight divided evenly over its tokens; sums to the sum of weights."""
        return (self.weight / self.length).index_select(0, self.unit)


@dataclass(frozen=True, eq=False, slots=True)
class LossOutput:
    loss: Tensor
    """Scalar: this call's share of the step's loss."""
    ratio: Tensor
    """float[U], detached."""
    clipped: Tensor
    """bool[U]."""
    masked: Tensor
    """bool[S]: tokens left out because the engines disagree on them."""
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    """Where several terms make up the loss: the share of each, by name, detached; their sum is `loss`."""
    counts: Mapping[str, Tensor] = field(default_factory=dict)
    """Sampled tokens of which something holds, by name: known to a teacher, clipped, masked."""


@dataclass(frozen=True, slots=True)
class Loss:
    """What the entry-point group `kat_stream.losses` registers."""

    units: Callable[[TrainBatch, RatioConfig], Units]
    """Units of the whole step, before packing."""
    value: Callable[[LossInputs, RatioConfig], LossOutput]
    """Share of the step's loss of some whole units."""


def ratio_units(batch: TrainBatch, config: RatioConfig) -> Units:
    """Units at the configured level, as every loss on ratios forms them."""
    return make_units(config.level, batch.lengths, batch.rollout, batch.advantage, batch.weight)
