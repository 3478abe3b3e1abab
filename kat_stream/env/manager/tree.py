"""The default: each unique token once, in depth-first order, as the learner trains it; one row a root.

Row columns are named like the fields of `topics.batch.PackedRow`. Invariant: `index` names every sampled token of
every kept turn exactly once, and walking `parent` from there spells that turn's prompt.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from kat_stream.env.manager.base import Columns, Row
from kat_stream.env.manager.rollout import Rollout
from kat_stream.env.manager.transcript import Policy
from kat_stream.trees import build_forest

COLUMNS: Columns = {
    "ids": "int32[]",
    "pos": "int32[]",
    "parent": "int32[]",
    "end": "int32[]",
    "turn_ids": "string[]",
    "turn_len": "int32[]",
    "index": "int32[]",
    "logprobs": "float32[]",
}
"""ids, pos, parent, end: int32[N]. turn_ids, turn_len: [M]. index, logprobs: [sum(turn_len)], turns one by one."""


class Tree:
    columns: Columns = COLUMNS

    def rows(self, rollout: Rollout, policy: Policy) -> Iterable[Row]:
        turns = [step.tokens for step in rollout.learned()]
        for layout in build_forest(turns):
            members = [turns[number] for number in layout.turns]
            yield {
                "ids": layout.ids,
                "pos": layout.pos,
                "parent": layout.parent,
                "end": layout.end,
                "turn_ids": [turn.turn_id for turn in members],
                "turn_len": layout.lengths,
                "index": layout.index,
                "logprobs": np.concatenate([turn.logprobs for turn in members]),
            }


FORMAT = Tree()
