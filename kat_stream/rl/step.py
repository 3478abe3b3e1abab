"""The groups of one optimizer step as one batch: what is still fresh enough, and how old it is. Pure.

Invariant: a rollout that is older than the bound when the step is made has no weight in the gradient and is named.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from kat_stream.errors import BatchError
from kat_stream.rl.staleness import Forks, age, is_stale
from kat_stream.trees import TrainBatch, from_arrays, merge
from kat_stream.trees.routes import check_routes
from kat_stream.trees.wire import arrays_of, to_arrays
from topics import GroupMember, PackedBatch, parse_version

MOST = 1 << 31
"""No limit: ids and positions are int32."""


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
        old = np.array([_is_stale(member, head, forks, bound) for member in packed], bool)
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


def batch_digest(batch: TrainBatch) -> str:
    """sha256 over every array of the batch with its length, then rollout ids and ages: equal only for equal bits."""
    digest = hashlib.sha256()
    for row in to_arrays(batch):
        for name, array in row.items():
            digest.update(f"{name}[{len(array)}]".encode())
            digest.update(array.tobytes())
    digest.update(repr((batch.rollout_ids, batch.ages)).encode())
    return digest.hexdigest()


def check_group(
    group: PackedBatch,
    vocabulary: int = MOST,
    max_positions: int = MOST,
    routing: tuple[int, int] | None = None,
) -> None:
    """`BatchError` if a model of this size cannot learn from the group: said when it arrives, not during a step.

    `routing`: width of a token's routed experts and number of experts, where they are replayed.
    """
    packed = [member for member in group.members if member.fate == "packed"]
    batch = from_arrays([arrays_of(row) for row in group.rows], [member.rollout_id for member in packed])
    for number, row in enumerate(batch.rows):
        if not len(row.turns):
            raise BatchError(f"row {number}: no turn lies in its {len(row)} tokens")
        if row.depth > max_positions:
            raise BatchError(f"row {number}: a path has {row.depth} tokens, the model has {max_positions} positions")
        if int(row.ids.max(initial=-1)) >= vocabulary:
            raise BatchError(f"row {number}: id {row.ids.max()} is outside the vocabulary of {vocabulary}")
    if routing is not None:
        check_routes(batch.rows, *routing)
    share = np.bincount(batch.rollout, batch.weight, minlength=len(packed))
    for member, weight in zip(packed, share, strict=True):
        if not member.rollout_id:
            raise BatchError("a member has no rollout_id")
        if weight <= 0:
            raise BatchError(f"{member.rollout_id} is packed, but has no weight in any row")
        try:
            for version in _versions(member):
                parse_version(version)
        except ValueError as error:
            raise BatchError(f"{member.rollout_id}: versions: {error}") from error


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


def _versions(member: GroupMember) -> tuple[str, ...]:
    """The oldest when it was packed need not be the oldest now: a lineage may have been left behind since."""
    return (member.oldest_version, *member.versions)


def _is_stale(member: GroupMember, head: str, forks: Forks, bound: int) -> bool:
    return any(is_stale(version, head, forks, bound) for version in _versions(member))


def _age(member: GroupMember, head: str, forks: Forks) -> int:
    """Of its oldest token, at least 0; 0 if it is on an abandoned branch, where it has no age."""
    ages = [age(version, head, forks) for version in _versions(member)]
    return max([0, *[steps for steps in ages if steps is not None]])


def _reward_mean(groups: Sequence[PackedBatch]) -> float:
    graded = [m.reward for group in groups for m in group.members if m.fate in ("packed", "filtered", "stale")]
    return float(np.mean(graded)) if graded else 0.0
