"""A finished rollout as formats see it: each turn with its whole path, and where on that path the policy spoke.

Invariant: `Step.ids[start:stop]` of a span are tokens that the policy sampled in exactly this context; spans of a step
do not overlap and its last one is the step's own turn, whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kat_stream.trees import TurnTokens, turns_of
from topics import Trajectory, Turn


class Span(NamedTuple):
    """Tokens [start, stop) of a path were sampled by the turn with this number in the rollout."""

    start: int
    stop: int
    turn: int


@dataclass(frozen=True, eq=False, slots=True)
class Step:
    """One turn on its path."""

    number: int
    record: Turn
    tokens: TurnTokens
    ids: NDArray[np.int32]
    """int32[P + T]: prompt and sampled."""
    spans: tuple[Span, ...]
    """In the order of the path. An ancestor of which only a part is on the path has only that part here."""

    @property
    def depth(self) -> int:
        """Turns on its path, itself included."""
        return len(self.spans)


@dataclass(frozen=True, eq=False, slots=True)
class Rollout:
    """A trajectory with its score; `kept` are the numbers of the turns to learn from, in the order to write them."""

    trajectory: Trajectory
    score: float | None
    steps: tuple[Step, ...]
    kept: tuple[int, ...]
    failed: frozenset[int] = frozenset()
    """Turns that are left out because their tool call failed."""

    def learned(self) -> list[Step]:
        return [self.steps[number] for number in self.kept]

    def logprobs(self, span: Span) -> NDArray[np.float32]:
        """float32[stop - start]: behaviour log-probabilities in nats of the tokens of a span."""
        return self.steps[span.turn].tokens.logprobs[: span.stop - span.start]


def rollout_of(trajectory: Trajectory, score: float | None) -> Rollout:
    """All trainable turns kept, in order of completion. TurnError if a turn cannot be trained on."""
    steps: list[Step] = []
    numbers: dict[str, int] = {}
    for number, (record, tokens) in enumerate(zip(trajectory.turns, turns_of(trajectory.turns), strict=True)):
        start = len(tokens.prompt_ids)
        ids = np.concatenate([tokens.prompt_ids, tokens.sampled_ids])
        above = steps[numbers[record.parent]].spans if record.parent else ()
        kept = (Span(s.start, min(s.stop, record.prefix_len), s.turn) for s in above if s.start < record.prefix_len)
        steps.append(Step(number, record, tokens, ids, (*kept, Span(start, len(ids), number))))
        numbers[record.turn_id] = number
    trainable = tuple(step.number for step in steps if step.record.trainable)
    return Rollout(trajectory, score, tuple(steps), trainable)
