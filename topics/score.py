"""`scores`: log-probabilities of a trajectory's sampled tokens under a teacher or under repeated prefills.

`logprobs` is float32[repeats, sum of T over `turn_ids`], row-major, turns in the order given.
"""

from __future__ import annotations

from topics.record import Record


class Score(Record, frozen=True, kw_only=True, tag="Score/1"):
    group_id: str
    rollout_id: str
    scorer: str
    version: str
    turn_ids: tuple[str, ...]
    repeats: int
    logprobs: bytes
