"""Which optimizer steps count: those of the surviving branch of trainer lineages. Pure.

Invariant: the answer depends on the set of `train.steps` records, never on their order or repetition.
A trainer that restarts from a checkpoint opens a new lineage and makes the steps after the checkpoint again; what the
abandoned lineage did from there on is on no surviving branch (topics/policy_version.py).
Which lineage came later is known by the times of its steps, so these grow whatever the trainer's clock does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Protocol

TICK_S = 0.001


def time_of_step(now_s: float, before_s: float) -> float:
    """`TrainStep.unix_s` of a step made now, after one that bears the time `before_s`: never earlier than that."""
    return max(now_s, before_s + TICK_S)


class Step(Protocol):
    """A `topics.TrainStep`, or what is kept of one."""

    @property
    def lineage(self) -> str: ...
    @property
    def step(self) -> int: ...
    @property
    def unix_s(self) -> float: ...


def surviving[S: Step](steps: Iterable[S]) -> list[S]:
    """The steps of the surviving branch in order: each number once, from the lineage that made it last."""
    lineages: dict[str, list[S]] = defaultdict(list)
    for step in steps:
        lineages[step.lineage].append(step)
    newest_first = sorted(lineages.values(), key=_opened, reverse=True)
    kept: dict[int, S] = {}
    fork: float = float("inf")
    for made in newest_first:
        for step in made:
            if step.step < fork:
                kept[step.step] = step
        fork = min(fork, min(step.step for step in made))
    return [kept[number] for number in sorted(kept)]


def _opened(made: Sequence[Step]) -> tuple[float, str]:
    """When the lineage made its first step; the name breaks ties."""
    return min(step.unix_s for step in made), made[0].lineage
