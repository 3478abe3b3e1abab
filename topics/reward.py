"""`rewards`: one grading of one trajectory, written by the verifier service; read by packer, evaluation, viewers.

A verifier that failed writes `status="failed"`: that is no score, and it is never read as 0.
"""

from __future__ import annotations

from typing import Literal

from topics.record import Record


class Reward(Record, frozen=True, kw_only=True, tag="Reward/1"):
    group_id: str
    rollout_id: str
    task_id: str
    verifier: str
    verifier_version: str = "1"
    status: Literal["graded", "failed"] = "graded"
    score: float = 0.0
    components: dict[str, float] = {}
    evidence: str = ""
    """Tail of the verifier's output."""
    error_class: str = ""
    purpose: Literal["train", "eval"] = "train"
    round: int = 0
    seconds: float = 0.0
    life: str = ""
    """Of the trajectory that was graded; empty: an earlier build did not say, it may be any of the rollout's."""
