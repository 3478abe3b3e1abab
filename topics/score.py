"""`scores`: log-probabilities of a trajectory's sampled tokens under a teacher or under repeated prefills.

`logprobs` is float32[repeats, sum of T over `turn_ids`], row-major, turns in the order given. A trajectory that asked
for a score and got none has a record, too, with `reason` and no turns: the packer need not wait for it.
"""

from __future__ import annotations

from typing import Literal

from topics.record import Record


class Score(Record, frozen=True, kw_only=True, tag="Score/1"):
    group_id: str
    rollout_id: str
    scorer: str
    version: str
    turn_ids: tuple[str, ...]
    repeats: int
    logprobs: bytes
    kind: Literal["repeats", "teacher"] = "repeats"
    """The policy's own engines, again and again (MCLA), or a teacher for distillation."""
    reason: str = ""
    """Why there are no log-probs: no_turns | other_version | unmapped | engine: ...; empty: there are."""
    identical: bool = False
    """All repeats are equal to the bit: nothing was sampled, and averaging them is no benefit."""
    life: str = ""
    """Of the trajectory that was scored, as in a reward."""
