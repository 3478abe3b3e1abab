"""One row a rollout: its longest path, with everything to learn that the policy said on it; other branches are dropped.

For comparison with systems that train so; on Terminal-Bench 2 whole trees were better, 28.8 against 20.9
(research/training.md 1.3). Invariant: no sampled token is learned twice.
"""

from __future__ import annotations

from collections.abc import Iterable

from kat_stream.env.manager.base import Columns, Row
from kat_stream.env.manager.masked import COLUMNS, masked
from kat_stream.env.manager.rollout import Rollout
from kat_stream.env.manager.transcript import Policy


class LongestBranch:
    columns: Columns = COLUMNS

    def rows(self, rollout: Rollout, policy: Policy) -> Iterable[Row]:
        learned = rollout.learned()
        if learned:
            longest = max(learned, key=lambda step: len(step.ids))
            yield masked(rollout, longest, [span for span in longest.spans if span.turn in set(rollout.kept)])


FORMAT = LongestBranch()
