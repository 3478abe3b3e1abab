"""The whole objective of a step: a policy loss, and the terms that are added to it with a coefficient.

    L = L_policy + c_d * L_distillation + c_k * KL - c_e * H

Invariant: a term with coefficient 0 is not computed, so the loss is then the policy loss to the bit. Terms stay apart:
the clip of a turn's ratio would silence the dense signal of a teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from kat_stream.errors import BatchError
from kat_stream.rl.distillation import distillation
from kat_stream.rl.loss import Loss, LossInputs, LossOutput
from kat_stream.rl.penalty import entropy, kl
from kat_stream.rl.settings import DistillationConfig, PenaltyConfig, RatioConfig
from kat_stream.rl.units import Units
from kat_stream.trees.batch import TrainBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    policy: Loss
    ratio: RatioConfig = field(default_factory=RatioConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    penalty: PenaltyConfig = field(default_factory=PenaltyConfig)

    @property
    def needs_entropy(self) -> bool:
        return self.penalty.entropy_coefficient > 0

    @property
    def needs_reference(self) -> bool:
        return self.penalty.kl_coefficient > 0

    def units(self, batch: TrainBatch) -> Units:
        """Units of the whole step, before packing.

        `BatchError` for a batch that cannot be learned from: said here, before several ranks part to run its trees.
        """
        if self.distillation.coefficient > 0 and batch.teacher_logprobs is None:
            raise BatchError("distillation is on, but the batch holds no teacher's log-probs")
        return self.policy.units(batch, self.ratio)

    def value(self, inputs: LossInputs) -> LossOutput:
        """Share of the step's loss of some whole units; ratio, clips and masks are those of the policy loss."""
        output = self.policy.value(inputs, self.ratio)
        terms: dict[str, Tensor] = {}
        counts: Mapping[str, Tensor] = {}
        if self.distillation.coefficient > 0:
            distilled = distillation(inputs, self.ratio, self.distillation)
            terms["distillation"] = self.distillation.coefficient * distilled.loss
            counts = distilled.counts
        if self.needs_reference:
            terms["kl"] = self.penalty.kl_coefficient * kl(inputs, self.penalty.kl_estimator)
        if self.needs_entropy:
            terms["entropy"] = -self.penalty.entropy_coefficient * entropy(inputs)
        if not terms:
            return output
        shares = {name: term.detach() for name, term in ({"policy": output.loss} | terms).items()}
        return replace(output, loss=output.loss + sum(terms.values()), terms=shares, counts=counts)
