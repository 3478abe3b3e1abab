"""Rows of plain token ids with labels, as `per-turn`, `linear` and `longest-branch` write them.

`input_ids` and `labels` are what TRL and the trainer of `transformers` take as they are: labels are -100 where nothing
is learned, and are not shifted. Invariant: a label that is not -100 is the id that the policy sampled there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kat_stream.env.manager.base import Columns, Row
from kat_stream.env.manager.rollout import Rollout, Span, Step

IGNORED = -100
COLUMNS: Columns = {
    "input_ids": "int32[]",
    "labels": "int32[]",
    "logprobs": "float32[]",
    "turn_ids": "string[]",
}
"""Three arrays of one length; `logprobs` are of the behaviour policy, in nats, 0 where nothing is learned."""


def masked(rollout: Rollout, step: Step, spans: Sequence[Span]) -> Row:
    """The path of a step with these of its spans to learn."""
    labels = np.full(len(step.ids), IGNORED, np.int32)
    logprobs = np.zeros(len(step.ids), np.float32)
    for span in spans:
        at = slice(span.start, span.stop)
        labels[at] = step.ids[at]
        logprobs[at] = rollout.logprobs(span)
    turn_ids = [rollout.steps[span.turn].record.turn_id for span in spans]
    return {"input_ids": step.ids, "labels": labels, "logprobs": logprobs, "turn_ids": turn_ids}
