"""`train.steps`: one optimizer step, with all that is needed to repeat it. Written by the trainer.

`trained` names every rollout in the gradient; `positions` are the offsets of `batches` after this step.
"""

from __future__ import annotations

from topics.record import Record


class TrainStep(Record, frozen=True, kw_only=True, tag="TrainStep/1"):
    lineage: str
    step: int
    metrics: dict[str, float]
    groups: tuple[str, ...]
    trained: tuple[str, ...]
    stale: tuple[str, ...] = ()
    """Packed, but older than the bound when the step was made."""
    positions: dict[str, int] = {}
    """Partition -> next offset of `batches`."""
    unix_s: float = 0.0
