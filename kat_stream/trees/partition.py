"""A row that is too large to run at once, cut into parts that run one after the other, each token in exactly one.

Invariant: parts are consecutive ranges in DFS order, none larger than the budget. A part's first-level tokens have one
parent: the last token of the part around it, or none. A part that others hang from is one unbranched run, so the parts
that are open at once are a path: live tokens <= the longest path + the largest part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kat_stream.errors import BatchError
from kat_stream.trees.layout import TreeLayout


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens [start, stop); what hangs from the last of them ends at `close` (= stop for a part of whole subtrees)."""

    start: int
    stop: int
    close: int

    def __len__(self) -> int:
        return self.stop - self.start


def partition(layout: TreeLayout, budget_tokens: int) -> list[Part]:
    """Parts in DFS order; one if the row fits. A run longer than the budget is cut inside.

    Raises `BatchError` for a budget below one token.
    """
    if budget_tokens < 1:
        raise BatchError(f"a budget of {budget_tokens} tokens holds no part of a tree")
    return list(_cut(layout, budget_tokens))


def _cut(layout: TreeLayout, budget: int) -> Iterator[Part]:
    size, at = len(layout), 0
    end, parent = layout.end.tolist(), layout.parent.tolist()
    # end changes where a run ends: its tokens enclose the same descendants.
    turning = np.append(np.flatnonzero(np.diff(layout.end)) + 1, size)
    while at < size:
        if end[at] - at > budget:
            run = int(turning[np.searchsorted(turning, at, "right")])
            stop = min(run, at + budget)
            yield Part(at, stop, end[at])
        else:
            stop = end[at]
            while stop < size and parent[stop] == parent[at] and end[stop] - at <= budget:
                stop = end[stop]
            yield Part(at, stop, stop)
        at = stop


def with_path(layout: TreeLayout, part: Part) -> tuple[TreeLayout, int]:
    """The part below the path that leads to it, as one layout, and the number of tokens of that path. No turns."""
    path = layout.path_to(part.start)[:-1]
    above, span = len(path), slice(part.start, part.stop)
    parent = layout.parent[span] - part.start + above
    total = above + len(part)
    none = np.empty(0, np.int32)
    chain = np.arange(above, dtype=np.int32)
    return TreeLayout(
        ids=np.concatenate([layout.ids[path], layout.ids[span]]),
        pos=np.concatenate([layout.pos[path], layout.pos[span]]),
        parent=np.concatenate([chain - 1, np.maximum(parent, above - 1)]).astype(np.int32),
        end=np.concatenate(
            [np.full(above, total), np.minimum(layout.end[span], part.stop) - part.start + above]
        ).astype(np.int32),
        turns=none,
        lengths=none,
        index=none,
    ), above


def parts_of(parts: list[Part], tokens: NDArray[np.int32]) -> NDArray[np.int64]:
    """int64: number of the part that each token lies in."""
    return np.searchsorted(np.array([part.stop for part in parts]), tokens, "right").astype(np.int64)
