"""What a format is: a finished rollout in, rows of a data set out.

A package of yours adds one by an entry point in the group `kat_stream.formats` that names an object of this protocol.
Invariant: every row of a format has exactly its columns; the exporter puts `COMMON` in front of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, Protocol

from kat_stream.env.manager.rollout import Rollout
from kat_stream.env.manager.transcript import Policy

GROUP = "kat_stream.formats"
Kind = Literal["bool", "int64", "float64", "string", "json", "int32[]", "float32[]", "string[]", "json[]"]
"""Of a column; `json` is any JSON value, for what differs from row to row (messages, tools)."""
Columns = Mapping[str, Kind]
Row = dict[str, Any]

COMMON: Columns = {
    "run": "string",
    "group_id": "string",
    "rollout_id": "string",
    "task_id": "string",
    "scaffold": "string",
    "outcome": "string",
    "score": "float64",
}
"""In front of every row; `score` is null for what was not graded."""


class Format(Protocol):
    @property
    def columns(self) -> Columns:
        """The columns of its rows and their kinds."""

    def rows(self, rollout: Rollout, policy: Policy) -> Iterable[Row]:
        """The rows of one rollout, learned turns only: `rollout.kept`. DataError if it cannot be written so."""


def common(rollout: Rollout) -> Row:
    """The values of COMMON."""
    made = rollout.trajectory
    task = made.request.task
    values = (made.run, made.group_id, made.rollout_id, task.task_id, task.scaffold, made.outcome, rollout.score)
    return dict(zip(COMMON, values, strict=True))
