"""What to ask for next: evaluation rounds and training groups, gated by policy versions in flight. Pure.

Invariant (bounded staleness, producer side): the number of training groups ever asked for is at most
`(version + 1 + staleness) * groups_per_step`, so a group never waits for more than `staleness` steps beyond its own.
Every id is a function of (run, index): asking twice yields the same ids, so a restarted sampler repeats nothing.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from kat_stream.mix import members
from topics import RolloutRequest, Sampling, Task


class Groups(msgspec.Struct, frozen=True):
    """A set of training groups by number: all below one, and some beyond it."""

    below: int = 0
    beyond: tuple[int, ...] = ()

    def added(self, numbers: Iterable[int]) -> Groups:
        """With these too; negative ones are no groups."""
        beyond = {number for number in (*self.beyond, *numbers) if number >= self.below}
        below = self.below
        while below in beyond:
            beyond.remove(below)
            below += 1
        return Groups(below, tuple(sorted(beyond)))

    def free(self, number: int) -> int:
        """The first number from this one on that is not among them."""
        number = max(number, self.below)
        while number in self.beyond:
            number += 1
        return number

    def union(self, below: int) -> int:
        """How many there are together with all numbers below this one."""
        return max(below, self.below) + sum(number >= below for number in self.beyond)


@dataclass(slots=True)
class Progress:
    """What the log says so far."""

    version: int = -1
    """Number of the newest policy version; -1 before the first."""
    train_groups: int = 0
    """After the last training group that was asked for on this log."""
    trained: Groups = Groups()
    """In the newest version's steps. On a new log that resumes at a checkpoint these were asked for on another."""
    eval_asked: dict[int, set[str]] = field(default_factory=dict)
    """Round -> rollout ids asked for."""
    eval_settled: set[str] = field(default_factory=set)
    """Evaluation rollouts that were graded or have failed."""

    def next_group(self) -> int:
        """The number of the group to ask for next: a trained one is never asked for again."""
        return self.trained.free(self.train_groups)

    def admitted(self) -> int:
        """Training groups asked for, on this log or another."""
        return self.trained.union(self.train_groups)

    def round_open(self, number: int) -> bool:
        return not self.eval_asked.get(number, set()) <= self.eval_settled


@dataclass(frozen=True, slots=True)
class Schedule:
    """The whole run, decided beforehand."""

    run: str
    seed: int
    steps: int
    group_size: int
    groups_per_step: int
    staleness: int
    sampling: Sampling
    eval_before: bool
    eval_after: bool
    eval_every: int
    eval_tasks: int
    mix: Mapping[str, float] = field(default_factory=dict)
    """Scaffolds and their weights; empty: each task names its own."""

    def admissible_groups(self, version: int) -> int:
        """How many training groups may have been asked for when the newest version is `version`; none before one."""
        if version < 0:
            return 0
        ahead = (version + 1 + self.staleness) * self.groups_per_step
        return max(0, min(ahead, self.steps * self.groups_per_step))

    def group(self, index: int, tasks: Sequence[Task], deadline_unix_s: float) -> list[RolloutRequest]:
        """Training group number `index`: the data set in a new seeded order each epoch."""
        epoch, offset = divmod(index, len(tasks))
        task = tasks[_order(self.seed, epoch, len(tasks))[offset]]
        return self._requests(f"{self.run}-t{index:06d}", task, self.group_size, "train", epoch, deadline_unix_s)

    def evaluation(self, number: int, tasks: Sequence[Task], deadline_unix_s: float) -> Iterator[RolloutRequest]:
        """Evaluation round `number` (the policy version it starts at): one rollout a task."""
        for index, task in enumerate(tasks):
            group_id = f"{self.run}-e{number:05d}-{index:04d}"
            yield from self._requests(group_id, task, 1, "eval", number, deadline_unix_s)

    def due_round(self, progress: Progress) -> int | None:
        """The evaluation round to start now, if any: before, in between, or after training."""
        version = progress.version
        if version < 0 or version in progress.eval_asked:
            return None
        if version >= self.steps:
            return version if self.eval_after else None
        if version == 0:
            return version if self.eval_before and not progress.train_groups else None
        last = max(progress.eval_asked, default=0)
        return version if self.eval_every and version // self.eval_every > last // self.eval_every else None

    def blocks_training(self, number: int, progress: Progress) -> bool:
        """Only the round before training holds training back."""
        return progress.train_groups == 0 and progress.round_open(number)

    def finished(self, progress: Progress) -> bool:
        if progress.version < self.steps or (self.eval_after and progress.version not in progress.eval_asked):
            return False
        return not any(progress.round_open(number) for number in progress.eval_asked)

    def _requests(
        self, group_id: str, task: Task, size: int, purpose: str, number: int, deadline_unix_s: float
    ) -> list[RolloutRequest]:
        tasks = self._under(task, size, group_id if purpose == "train" else task.task_id)
        return [
            RolloutRequest(
                run=self.run,
                group_id=group_id,
                rollout_id=f"{group_id}-{sample}",
                sample=sample,
                group_size=size,
                purpose="eval" if purpose == "eval" else "train",
                task=tasks[sample],
                sampling=self.sampling,
                deadline_unix_s=deadline_unix_s,
                round=number,
            )
            for sample in range(size)
        ]

    def _under(self, task: Task, size: int, what: str) -> list[Task]:
        """The task once for each member, under that member's scaffold; an evaluation asks the same in each round."""
        if not self.mix:
            return [task] * size
        names = members(self.mix, size, random.Random(f"{self.seed}/{what}"))
        return [msgspec.structs.replace(task, scaffold=name) for name in names]


def number_of(group_id: str) -> int:
    """The number in a training group's id; -1 for an id that is not ours."""
    number = group_id.rpartition("-t")[2]
    return int(number) if number.isdecimal() else -1


def group_of(rollout_id: str) -> str:
    """The group of a rollout, from its id as `Schedule` makes them."""
    return rollout_id.rpartition("-")[0]


def _order(seed: int, epoch: int, count: int) -> list[int]:
    order = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order
