"""Which optimizer steps led to a step, from the records of a run. Pure.

Invariant: a branch is complete: its steps are numbered 1, 2, ... and each was made by the lineage that the next one
goes on from. Where a record is gone, the error names it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import takewhile

from kat_stream.errors import DataError
from kat_stream.observe.lineages import surviving
from kat_stream.rl.staleness import Forks, forks_of
from topics import PolicyVersion, Record, TrainStep

TOPICS = ("train.steps", "policy.versions")


@dataclass(slots=True)
class History:
    """Feed it the records of `TOPICS`; others are ignored."""

    steps: dict[tuple[str, int], TrainStep] = field(default_factory=dict)
    versions: dict[tuple[str, int], PolicyVersion] = field(default_factory=dict)

    def apply(self, record: Record) -> None:
        """Take in one record, again or for the first time."""
        if isinstance(record, TrainStep):
            self.steps[record.lineage, record.step] = record
        elif isinstance(record, PolicyVersion):
            self.versions[record.lineage, record.number] = record

    @property
    def forks(self) -> Forks:
        return forks_of(self.versions.values())

    def step(self, number: int, lineage: str = "") -> TrainStep:
        """Step `number` of a lineage, or of the surviving branch. `DataError` if there is none, with what there is."""
        found = [step for (of, at), step in self.steps.items() if at == number and of == lineage]
        found = found if lineage else [step for step in self.survivors() if step.step == number]
        if found:
            return found[0]
        made = sorted(at for of, at in self.steps if lineage in ("", of))
        there = f"there are {made[0]} to {made[-1]}" if made else "there is none"
        raise DataError(f"no step {number}{f' of lineage {lineage}' if lineage else ''} on record; {there}")

    def survivors(self) -> list[TrainStep]:
        """The steps that count, in order."""
        return surviving(self.steps.values())

    def ready(self) -> list[TrainStep]:
        """The steps that count and whose versions are known too: the two topics are read in no common order.

        `DataError` if the first ones are gone.
        """
        newest: dict[str, int] = {}
        for lineage, number in self.versions:
            newest[lineage] = max(number, newest.get(lineage, number))
        survivors = self.survivors()
        if survivors and survivors[0].step > 1:
            raise DataError(f"the records of the steps before {survivors[0].step} are gone from train.steps")
        return list(takewhile(lambda step: newest.get(step.lineage, -1) >= step.step, survivors))

    def branch(self, last: TrainStep) -> list[TrainStep]:
        """Every step from the model as it ships to `last`, in order. `DataError` names the first that is missing."""
        forks = self.forks
        made: list[TrainStep] = []
        lineage = last.lineage
        for number in range(last.step, 0, -1):
            while lineage in forks and number <= forks[lineage][1]:
                lineage = forks[lineage][0]
            if (lineage, number) not in self.steps:
                raise DataError(f"the record of step {number} of lineage {lineage} is gone from train.steps")
            made.append(self.steps[lineage, number])
        return made[::-1]
