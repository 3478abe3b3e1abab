"""What one optimizer step reports.

Invariant: sums are kept per micro-batch and divided once at the end, so numbers do not depend on how rows were grouped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from kat_stream.rl.loss import LossInputs, LossOutput
from kat_stream.trees.batch import TrainBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMetrics:
    step: int
    """Optimizer steps done, this one included."""
    applied: bool
    """False: the gradient was not finite and the weights were left as they were."""
    loss: float
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    mean_ratio: float
    """Over units, before clipping."""
    clip_fraction: float
    """Clipped units over all units."""
    log_ratio_abs: float
    """Mean |logp - behaviour logp| per sampled token, in nats: how far training and sampling are apart."""
    entropy: float
    """Mean -logp per sampled token, in nats: an estimate of the policy's entropy while on-policy."""
    masked_fraction: float
    """Tokens left out by IcePop over all sampled tokens."""
    units: int
    turns: int
    trained_tokens: int
    """Sampled tokens, each turn's own."""
    tree_tokens: int
    """Unique tokens computed."""
    flat_tokens: int
    """Tokens that separate paths would have computed."""
    tree_ratio: float
    """flat_tokens / tree_tokens."""
    peak_tokens: int
    """Most unique tokens whose activations were alive at once."""
    tokens_per_second: float
    """Unique tokens a second."""
    seconds: float
    staleness_mean: float
    """Versions, over rollouts; 0 if ages are unknown."""
    staleness_max: int
    extra: dict[str, float] = field(default_factory=dict)
    """Of what is switched on: `loss_NAME`, the share of each term in `loss`; `NAME_fraction` of sampled tokens known to
    a teacher, clipped or masked in a term; `routing_replayed`, decisions of routers that took the engine's experts, and
    `routing_agreement`, those among them that the learner would have made itself."""

    def as_dict(self) -> dict[str, float]:
        """Plain numbers for a record."""
        values = asdict(self)
        return {name: float(value) for name, value in ({**values.pop("extra"), **values}).items()}


class Tally:
    """Running sums over the micro-batches of one step."""

    def __init__(self) -> None:
        self.loss = self.ratio = self.clipped = self.gap = self.entropy = self.masked = 0.0
        self.units = self.peak_tokens = 0
        self.terms: dict[str, float] = {}
        self.counts: dict[str, float] = {}
        """Tokens, and decisions of routers."""

    def add(self, inputs: LossInputs, output: LossOutput) -> None:
        """Units without weight (stale ones) count for nothing but the tokens they hold."""
        logp = inputs.logp.detach()
        weighty = inputs.weight > 0
        self.loss += output.loss.item()
        self.ratio += _sum(output.ratio[weighty])
        self.clipped += _sum(output.clipped[weighty])
        self.gap += _sum((logp - inputs.rollout_logp).abs())
        self.entropy -= _sum(logp)
        self.masked += _sum(output.masked)
        self.units += int(weighty.sum())
        add(self.terms, {name: term.item() for name, term in output.terms.items()})
        add(self.counts, {name: count.item() for name, count in output.counts.items()})

    def merge(self, other: Tally) -> None:
        """Take in the sums of another rank's micro-batches."""
        for name in ("loss", "ratio", "clipped", "gap", "entropy", "masked", "units"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        add(self.terms, other.terms)
        add(self.counts, other.counts)
        self.peak_tokens = max(self.peak_tokens, other.peak_tokens)

    def finish(
        self,
        batch: TrainBatch,
        *,
        step: int,
        updates: int,
        applied: bool,
        grad_norm: float,
        learning_rate: float,
        seconds: float,
    ) -> StepMetrics:
        sampled = batch.trained_tokens
        units = max(self.units, 1)  # a rank of several may have had none
        return StepMetrics(
            step=step,
            applied=applied,
            loss=self.loss / updates,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            mean_ratio=self.ratio / units,
            clip_fraction=self.clipped / units,
            log_ratio_abs=self.gap / sampled,
            entropy=self.entropy / sampled,
            masked_fraction=self.masked / sampled,
            units=self.units,
            turns=len(batch.advantage),
            trained_tokens=sampled,
            tree_tokens=batch.tree_tokens,
            flat_tokens=batch.flat_tokens,
            tree_ratio=batch.flat_tokens / batch.tree_tokens,
            peak_tokens=self.peak_tokens,
            tokens_per_second=batch.tree_tokens / max(seconds, 1e-9),
            seconds=seconds,
            staleness_mean=sum(batch.ages) / max(len(batch.ages), 1),
            staleness_max=max(batch.ages, default=0),
            extra=self._extra(sampled, updates),
        )

    def _extra(self, sampled: int, updates: int) -> dict[str, float]:
        counts = dict(self.counts)
        extra = {f"loss_{name}": value / updates for name, value in self.terms.items()}
        decisions, replayed, agreed = (counts.pop(f"routing_{name}", 0) for name in ("decisions", "known", "agreed"))
        if decisions:
            extra |= {"routing_replayed": replayed / decisions, "routing_agreement": agreed / max(replayed, 1)}
        return extra | {f"{name}_fraction": count / sampled for name, count in counts.items()}


def add(into: dict[str, float], more: Mapping[str, float]) -> None:
    """Sums by name."""
    for name, value in more.items():
        into[name] = into.get(name, 0) + value


def _sum(values: Tensor) -> float:
    return float(values.sum(dtype=torch.float64))
