"""`rollout.requests`: one attempt that the sampler asks for. Read by the rollout service.

`group_size` requests share a `group_id`; `sample` numbers them. All records of a group share a partition.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from topics.record import Record
from topics.task import Task


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """Forced on every model call of the rollout, whatever the agent asks for."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 4096
    max_turns: int = 64
    max_context: int = 32768


class RolloutRequest(Record, frozen=True, kw_only=True, tag="RolloutRequest/1"):
    group_id: str
    rollout_id: str
    sample: int
    group_size: int
    purpose: Literal["train", "eval"] = "train"
    task: Task
    sampling: Sampling
    deadline_unix_s: float
    version_floor: str = ""
    """Oldest policy version (`lineage.number`) whose turns may still be trained; empty: no floor."""
    round: int = 0
    """The evaluation round or the epoch over the data set that this request belongs to."""
