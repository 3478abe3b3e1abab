"""One row a turn: its whole prompt, and the tokens that it sampled to learn.

The simplest form, and the longest: a prompt stands in every turn that repeats it. Invariant: every sampled token of a
kept turn is learned in exactly one row.
"""

from __future__ import annotations

from collections.abc import Iterable

from kat_stream.env.manager.base import Columns, Row
from kat_stream.env.manager.masked import COLUMNS, masked
from kat_stream.env.manager.rollout import Rollout
from kat_stream.env.manager.transcript import Policy


class PerTurn:
    columns: Columns = COLUMNS

    def rows(self, rollout: Rollout, policy: Policy) -> Iterable[Row]:
        for step in rollout.learned():
            yield masked(rollout, step, step.spans[-1:])


FORMAT = PerTurn()
