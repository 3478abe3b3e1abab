"""The batch of a group that will never be complete. Pure.

Invariant: like any group it gets one batch with one fate for each of its members, also for those that nobody heard of,
so that the trainer's count and the ledger close; it teaches nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from topics import GroupMember, PackedBatch, Trajectory

INCOMPLETE = "incomplete"


def incomplete_batch(came: Sequence[Trajectory]) -> PackedBatch:
    """No rows, every member failed (incomplete); `came`: what there is of the group, one trajectory at least."""
    first = came[0]
    known = {trajectory.request.sample: trajectory.rollout_id for trajectory in came}
    ids = [known.get(sample, f"{first.group_id}-{sample}") for sample in range(first.request.group_size)]
    return PackedBatch(
        run=first.run,
        group_id=first.group_id,
        task_id=first.request.task.task_id,
        members=tuple(GroupMember(rollout_id=name, fate="failed", reason=INCOMPLETE) for name in ids),
        rows=(),
        flat_tokens=0,
        tree_tokens=0,
    )
