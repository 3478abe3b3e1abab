"""Turns that go on exactly where another ended share a row; a turn that does not begins one of its own.

An agent that only appends to its history gives one row. Invariant: every sampled token of a kept turn is learned in
exactly one row, in the context it was sampled in.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from kat_stream.env.manager.base import Columns, Row
from kat_stream.env.manager.masked import COLUMNS, masked
from kat_stream.env.manager.rollout import Rollout, Span, Step
from kat_stream.env.manager.transcript import Policy


@dataclass(slots=True)
class Line:
    """The path of its last turn, and what is learned on it."""

    last: Step
    spans: list[Span]

    def leads_to(self, step: Step) -> bool:
        """Whether the prompt of a turn begins with this whole line."""
        size = len(self.last.ids)
        return size <= len(step.tokens.prompt_ids) and np.array_equal(step.tokens.prompt_ids[:size], self.last.ids)


def merge(rollout: Rollout) -> list[Line]:
    """The kept turns as lines: each goes on with the longest line that leads to it."""
    lines: list[Line] = []
    for step in rollout.learned():
        before = max((line for line in lines if line.leads_to(step)), key=lambda line: len(line.last.ids), default=None)
        if before is None:
            lines.append(Line(step, [step.spans[-1]]))
        else:
            before.last = step
            before.spans.append(step.spans[-1])
    return lines


class Linear:
    columns: Columns = COLUMNS

    def rows(self, rollout: Rollout, policy: Policy) -> Iterable[Row]:
        for line in merge(rollout):
            yield masked(rollout, line.last, line.spans)


FORMAT = Linear()
