"""A row's attention as squares and rectangles of consecutive tokens: no mask, no gathered key, no pair too many.

A run is a stretch in which each token's parent is the token before it; what hangs from a token inside a run is
consecutive in DFS order, and so is the path that it sees of that run.
Invariant: every visible (query, key) pair lies in exactly one square (of a run with itself, causal) or rectangle (all
queries see all keys), and no other pair does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kat_stream.trees.layout import TreeLayout

Span = tuple[int, int]
"""[start, stop)."""


@dataclass(frozen=True, slots=True)
class Slices:
    """Queries are numbered from the token after `above`, keys from the first of the row."""

    runs: tuple[Span, ...]
    """Queries of each causal square, in order; their keys are the same tokens."""
    branches: tuple[tuple[Span, Span], ...]
    """(queries, keys) of each rectangle."""
    pairs: int
    """Visible query-key pairs."""


def cut_slices(layout: TreeLayout, above: int = 0) -> Slices:
    """Squares and rectangles of the row's tokens from `above` on; those before are one path that only gives keys."""
    at = np.arange(above, len(layout))
    starts = at[(layout.parent[above:] != at - 1) | (at == above)]
    stops = np.append(starts[1:], len(layout))
    hung = starts[layout.parent[starts] >= 0]
    forks, first = np.unique(layout.parent[hung], return_index=True)
    run = np.searchsorted(starts, forks, "right") - 1
    begins = np.where(forks < above, 0, starts[run])
    queries = zip((hung[first] - above).tolist(), (layout.end[forks] - above).tolist(), strict=True)
    keys = zip(begins.tolist(), (forks + 1).tolist(), strict=True)
    return Slices(
        runs=tuple(zip((starts - above).tolist(), (stops - above).tolist(), strict=True)),
        branches=tuple(zip(queries, keys, strict=True)),
        pairs=int((layout.pos[above:].astype(np.int64) + 1).sum()),
    )
