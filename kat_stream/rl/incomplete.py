"""A group that will never be complete: when it is given up, and the batch that says so. Pure.

Invariants: like any group it gets one batch with one fate for each of its members, also for those that nobody heard of,
so that the trainer's count and the ledger close; it teaches nothing. No clock that somebody sets can close a group too
early: only time spent listening counts. Besides, the log must have come that far: what piled up while the stage was
away is read before anything of it is given up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from topics import GroupMember, PackedBatch, Trajectory

INCOMPLETE = "incomplete"
GRACE_S = 900.0
"""So long after its rollouts had to be over a group may be ended, graded and read."""
LONGEST_TURN_S = 5.0
"""More does not count between two turns of a stage: it stood still, and has not heard what others wrote meanwhile."""


@dataclass(slots=True)
class Listening:
    """The time of one partition, in seconds. `turned_s`: the monotonic clock at its last turn."""

    turned_s: float
    listened_s: float = 0.0
    log_s: float = 0.0
    """Since the epoch: the newest time that a message bore, and how long the partition was silent since."""
    silent: bool = True

    def turn(self, monotonic_s: float) -> None:
        """The stage has looked for messages."""
        passed_s = min(max(0.0, monotonic_s - self.turned_s), LONGEST_TURN_S)
        self.turned_s = monotonic_s
        self.listened_s += passed_s
        self.log_s += passed_s if self.silent else 0.0
        self.silent = True

    def hear(self, log_s: float) -> None:
        """A message that was written at this time. Messages of one partition bear times of many clocks."""
        self.log_s = max(self.log_s, log_s)
        self.silent = False

    def overdue(self, heard_s: float, written_s: float, rollout_s: float) -> bool:
        """Of a group whose first message was written at `written_s` and heard after listening for `heard_s`.

        `rollout_s`: how long a rollout may last from its request on.
        """
        least_s = rollout_s + GRACE_S
        return self.listened_s - heard_s > least_s and self.log_s - written_s > least_s


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
