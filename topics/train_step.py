"""`train.steps`: one optimizer step, with all that is needed to repeat it. Written by the trainer.

`trained` names every rollout in the gradient; `positions` are the offsets of `batches` after this step; `batches` says
where the groups of this step lie. In a step that was written before this field was there, it is empty.
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
    batches: tuple[tuple[int, int], ...] = ()
    """(partition, offset) in `batches` of each of `groups`, in the order in which they were merged."""
    version: str = ""
    """Policy version that the gradient was taken at: the head by which staleness was judged."""
    checkpoint: str = ""
    """Newest checkpoint before this step, as `lineage.step`; empty: the model as it ships."""
    seed: int = 0
    threads: int = 0
    """Threads of the learner: sums are equal to the bit only with as many."""
    batch_sha256: str = ""
    """`kat_stream.rl.step.batch_digest` of what the learner was given."""
    learner_sha256: str = ""
    """`kat_stream.training.settings.digest` of loss and optimizer."""
