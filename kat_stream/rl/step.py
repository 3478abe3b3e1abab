"""The groups of one optimizer step as one batch: what is still fresh enough, and how old it is. Pure.

Invariant: a rollout that is older than the bound when the step is made has no weight in the gradient and is named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from kat_stream.rl.staleness import Forks, age, is_stale
from kat_stream.trees import TrainBatch, from_arrays, merge
from kat_stream.trees.wire import arrays_of
from topics import GroupMember, PackedBatch


@dataclass(frozen=True, slots=True)
class Step:
    batch: TrainBatch
    groups: tuple[str, ...]
    trained: tuple[str, ...]
    """Rollouts with a weight in the gradient."""
    stale: tuple[str, ...]
    reward_mean: float
    """Over all graded rollouts of the groups, those that were filtered included."""

    @property
    def teaches(self) -> bool:
        return bool(self.trained)


def assemble(groups: Sequence[PackedBatch], head: str, forks: Forks, bound: int) -> Step:
    """Merge groups; `BatchError` names the row and field of one that is inconsistent."""
    batches, ages = [], []
    trained: list[str] = []
    stale: list[str] = []
    for group in groups:
        packed = [member for member in group.members if member.fate == "packed"]
        old = np.array([is_stale(member.oldest_version, head, forks, bound) for member in packed], bool)
        batch = from_arrays([arrays_of(row) for row in group.rows], [member.rollout_id for member in packed])
        batches.append(replace(batch, weight=np.where(_of(old, batch), np.float32(0), batch.weight)))
        ages += [_age(member, head, forks) for member in packed]
        stale += [member.rollout_id for member, is_old in zip(packed, old, strict=True) if is_old]
        trained += [member.rollout_id for member, is_old in zip(packed, old, strict=True) if not is_old]
    return Step(
        batch=merge(batches, ages),
        groups=tuple(group.group_id for group in groups),
        trained=tuple(trained),
        stale=tuple(stale),
        reward_mean=_reward_mean(groups),
    )


def check_group(group: PackedBatch) -> None:
    """`BatchError` if the group's rows are inconsistent: said when it arrives, not in the middle of a step."""
    packed = [member.rollout_id for member in group.members if member.fate == "packed"]
    from_arrays([arrays_of(row) for row in group.rows], packed)


def without_rows(group: PackedBatch, reason: str) -> PackedBatch:
    """The group with nothing to learn from, for the account: its packed members are filtered with this reason."""
    members = tuple(
        msgspec.structs.replace(member, fate="filtered", reason=reason) if member.fate == "packed" else member
        for member in group.members
    )
    return msgspec.structs.replace(group, members=members, rows=())


def _of(members: np.ndarray, batch: TrainBatch) -> np.ndarray:
    """A value per member as a value per turn."""
    return members[batch.rollout] if len(members) else np.zeros(len(batch.rollout), bool)


def _age(member: GroupMember, head: str, forks: Forks) -> int:
    steps = age(member.oldest_version, head, forks)
    return 0 if steps is None else max(steps, 0)


def _reward_mean(groups: Sequence[PackedBatch]) -> float:
    graded = [m.reward for group in groups for m in group.members if m.fate in ("packed", "filtered", "stale")]
    return float(np.mean(graded)) if graded else 0.0
