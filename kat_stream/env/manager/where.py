"""`score>=1 and outcome=submitted`: which rollouts are meant. Pure.

Invariant: a condition on something that is not known (the score of what was not graded) does not hold.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kat_stream.env.manager.rollout import Rollout
from kat_stream.errors import ConfigError

FIELDS: Mapping[str, Callable[[Rollout], Any]] = {
    "score": lambda rollout: rollout.score,
    "outcome": lambda rollout: rollout.trajectory.outcome,
    "task": lambda rollout: rollout.trajectory.request.task.task_id,
    "dataset": lambda rollout: rollout.trajectory.request.task.dataset,
    "scaffold": lambda rollout: rollout.trajectory.request.task.scaffold,
    "group": lambda rollout: rollout.trajectory.group_id,
    "sample": lambda rollout: rollout.trajectory.request.sample,
    "turns": lambda rollout: len(rollout.kept),
    "tokens": lambda rollout: max((len(step.ids) for step in rollout.steps), default=0),
    "patch": lambda rollout: len(rollout.trajectory.patch),
    "seconds": lambda rollout: rollout.trajectory.seconds,
}
"""turns: trainable ones; tokens: of the longest path; patch: bytes."""
_COMPARE: Mapping[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "!=": operator.ne,
    "=": operator.eq,
    "==": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}
_CONDITION = re.compile(r"\s*(\w+)\s*(>=|<=|!=|==|=|>|<)\s*(.+?)\s*")
_NUMBERS = frozenset({"score", "sample", "turns", "tokens", "patch", "seconds"})


@dataclass(frozen=True, slots=True)
class Condition:
    field: str
    sign: str
    value: float | str

    def holds(self, rollout: Rollout) -> bool:
        found = FIELDS[self.field](rollout)
        return found is not None and _COMPARE[self.sign](found, self.value)


def parse_where(text: str) -> list[Condition]:
    """The conditions of a text, all of which have to hold; ConfigError names what is wrong and the fields."""
    parts = re.split(r"\s+and\s+", text.strip()) if text.strip() else []
    return [_condition(part) for part in parts]


def _condition(text: str) -> Condition:
    match = _CONDITION.fullmatch(text)
    if match is None or match[1] not in FIELDS:
        raise ConfigError(f"--where: {text!r} is not FIELD>=VALUE; fields: {', '.join(FIELDS)}")
    field, sign, value = match.groups()
    if field not in _NUMBERS:
        return Condition(field, sign, value)
    try:
        return Condition(field, sign, float(value))
    except ValueError:
        raise ConfigError(f"--where: {field} is a number, {value!r} is none") from None
