"""`trajectories`: a finished rollout, written by the rollout service; read by verifier, packer, archiver, viewers.

`turns` is the whole tree in order of completion: a reader needs no other topic to train on it or to read it.
A rollout may run twice, with another trajectory each time: what is said of one, a reward or a score, names its `life`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from topics.record import Record
from topics.request import RolloutRequest
from topics.turn import Turn

Outcome = Literal[
    "submitted", "turn_limit", "token_limit", "time_limit", "agent_error", "sandbox_died", "infra_error", "cancelled"
]

OUTCOMES: dict[str, str] = {
    "submitted": "the agent says it is done",
    "turn_limit": "it used all its turns",
    "token_limit": "a reply or the context ran out of tokens",
    "time_limit": "its time was up",
    "agent_error": "the agent program itself failed",
    "sandbox_died": "the agent destroyed its sandbox",
    "infra_error": "our side failed: never graded, never reward 0",
    "cancelled": "nobody needs it any more: never graded",
}
"""All but the last two are the agent's own doing and are graded."""


class Trajectory(Record, frozen=True, kw_only=True, tag="Trajectory/1"):
    group_id: str
    rollout_id: str
    attempt: int
    request: RolloutRequest
    turns: tuple[Turn, ...]
    outcome: Outcome
    detail: str = ""
    error_class: str = ""
    """For infra_error: the type of the error."""
    patch: bytes = b""
    """What the agent changed, as a binary git diff against the task's files."""
    log: str = ""
    """Tail of the agent's own output."""
    seconds: float = 0.0
    sandbox_s: float = 0.0
    life: str = ""
    """Drawn anew each time that the rollout runs; empty: an earlier build did not say."""

    @property
    def gradable(self) -> bool:
        return self.outcome not in ("infra_error", "cancelled")

    def own[T](self, said: Mapping[tuple[str, str], T]) -> T | None:
        """What is said of this life, by (rollout_id, life), or else of no life in particular; None if nothing is."""
        return said.get((self.rollout_id, self.life), said.get((self.rollout_id, "")))
