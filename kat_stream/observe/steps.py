"""One optimizer step as people see it, and the little that is kept of its record and of its groups. Pure.

Invariant: a view depends on the step's record and its groups' batches, in whatever order they came. Of a rollout some
20 bytes are kept, as there is no end of them: rollouts are known by a hash of their names.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Self

from kat_stream.observe.seen import hashed
from topics import PackedBatch, TrainStep
from topics.policy_version import parse_version

UNKNOWN = -1
"""Version number of a rollout that does not say with which weights it was sampled."""


@dataclass(frozen=True, slots=True)
class StepView:
    """One optimizer step. NaN where the run does not say."""

    step: int
    wall_s: float
    """Seconds from the run's first record to the end of this step."""
    reward: float
    """Mean reward of the graded rollouts of the step's groups, filtered groups included."""
    loss: float
    """NaN too for a step whose groups taught nothing."""
    clip_fraction: float
    staleness_mean: float
    staleness_max: float
    """Policy versions between the oldest token of a rollout and the weights that the step began with."""
    seconds: float
    """Of the learner's work, waiting for groups not included."""
    tree_tokens: int
    flat_tokens: int
    trained: int
    filtered: int
    """Rollouts of the step's groups that were left out: equal rewards, failed or too old."""


@dataclass(frozen=True, slots=True)
class PackedGroup:
    """What is kept of a group's batch."""

    rewards: array[float]
    packed: array[int]
    """Rollouts, hashed."""
    versions: array[int]
    """Number of the oldest version of each one's tokens, or UNKNOWN."""
    left_out: int
    tree_tokens: int
    flat_tokens: int

    @classmethod
    def of(cls, record: PackedBatch) -> Self:
        packed = {m.rollout_id: m.oldest_version for m in record.members if m.fate == "packed"}
        return cls(
            rewards=array("d", [m.reward for m in record.members if m.fate not in ("failed", "cancelled")]),
            packed=array("Q", map(hashed, packed)),
            versions=array("q", map(_number, packed.values())),
            left_out=len(record.members) - len(packed),
            tree_tokens=record.tree_tokens,
            flat_tokens=record.flat_tokens,
        )


def _number(version: str) -> int:
    """Of `lineage.number`; what is no version says nothing, and who watches a run goes on."""
    with suppress(ValueError):
        number = parse_version(version)[1]
        return number if number < 1 << 63 else UNKNOWN
    return UNKNOWN


class MadeStep:
    """What is kept of a step's record; once all its groups are known, only what people see of it."""

    __slots__ = ("_final", "_groups", "_metrics", "_stale", "_timestamp_ms", "_trained", "lineage", "step", "unix_s")

    def __init__(self, record: TrainStep, timestamp_ms: int) -> None:
        self.lineage, self.step, self.unix_s = record.lineage, record.step, record.unix_s
        self._groups = record.groups
        self._timestamp_ms = timestamp_ms
        self._trained = array("Q", map(hashed, record.trained))
        self._stale = len(record.stale)
        self._metrics: Mapping[str, float] = record.metrics
        self._final: StepView | None = None

    def view(self, groups: Mapping[str, PackedGroup], first_ms: int) -> StepView:
        """`groups`: all that are known; `first_ms`: when the run began."""
        wall_s = (self._timestamp_ms - first_ms) / 1000
        if self._final is not None:
            return replace(self._final, wall_s=wall_s)
        known = [groups[group_id] for group_id in self._groups if group_id in groups]
        seen = self._seen(known, wall_s)
        if len(known) == len(self._groups):
            self._final, self._metrics, self._trained, self._groups = seen, {}, array("Q"), ()
        return seen

    def _seen(self, known: Sequence[PackedGroup], wall_s: float) -> StepView:
        rewards = [reward for group in known for reward in group.rewards]
        ages = self._ages(known)
        return StepView(
            step=self.step,
            wall_s=wall_s,
            reward=fmean(rewards) if rewards else self._metric("reward_mean"),
            loss=self._metric("loss"),
            clip_fraction=self._metric("clip_fraction"),
            staleness_mean=fmean(ages) if ages else self._metric("staleness_mean"),
            staleness_max=max(ages) if ages else self._metric("staleness_max"),
            seconds=self._metric("step_seconds"),
            tree_tokens=sum(group.tree_tokens for group in known),
            flat_tokens=sum(group.flat_tokens for group in known),
            trained=len(self._trained),
            filtered=sum(group.left_out for group in known) + self._stale,
        )

    def _ages(self, known: Sequence[PackedGroup]) -> list[int]:
        """Steps from each trained rollout's oldest token to the weights the step began with (version step - 1)."""
        trained = set(self._trained)
        pairs = (pair for group in known for pair in zip(group.packed, group.versions, strict=True))
        return [max(0, self.step - 1 - number) for rollout, number in pairs if number != UNKNOWN and rollout in trained]

    def _metric(self, name: str) -> float:
        return self._metrics.get(name, float("nan"))
