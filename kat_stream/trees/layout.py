"""A token tree (or several) in DFS order: the one object that every attention back end is fed from.

Invariant: visible(q, k) <=> k <= q < end[k], which is true exactly for the ancestors of q and q itself; `pos` is the
depth on the path. So one integer a key is the whole attention mask, and rows of a loss are `parent[target]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kat_stream.errors import BatchError

Ints = NDArray[np.int32]
Routes = NDArray[np.uint16]
MISSING = np.uint16(65535)
"""In place of an expert's number: the token's routing was not recorded."""


@dataclass(frozen=True, eq=False, slots=True)
class TreeLayout:
    """N unique tokens and the M turns whose sampled tokens lie in them."""

    ids: Ints
    """int32[N] token ids."""
    pos: Ints
    """int32[N] depth on the token's own path, 0 for a root."""
    parent: Ints
    """int32[N] index of the parent token, -1 for a root; always smaller than the token's own."""
    end: Ints
    """int32[N] one past the last descendant."""
    turns: Ints
    """int32[M] number of each turn in the caller's list of turns."""
    lengths: Ints
    """int32[M] sampled tokens of each turn."""
    index: Ints
    """int32[sum(lengths)] where the sampled tokens lie, turns one after the other."""
    routes: Routes | None = None
    """uint16[N, W]: experts that the engine routed each token to (`trees.routes`), MISSING where it did not say."""

    def __len__(self) -> int:
        return len(self.ids)

    def tokens_of(self, turn: int) -> Ints:
        """int32[T]: indices of the sampled tokens of the turn-th turn of this layout."""
        stop = int(self.lengths[: turn + 1].sum())
        return self.index[stop - int(self.lengths[turn]) : stop]

    def path_to(self, token: int) -> NDArray[np.int64]:
        """int64[pos + 1]: the token's ancestors from its root, and the token itself."""
        return np.flatnonzero(self.end[: token + 1] > token)

    @property
    def depth(self) -> int:
        """Tokens on the longest path."""
        return int(self.pos.max(initial=-1)) + 1

    @property
    def flat_tokens(self) -> int:
        """Tokens that the leaf paths hold one by one; paths that are a prefix of another are not counted again."""
        leaf = self.end == np.arange(1, len(self) + 1)
        return int((self.pos[leaf].astype(np.int64) + 1).sum())


def concat(layouts: Sequence[TreeLayout]) -> TreeLayout:
    """Layouts side by side in one row: no token sees a token of another layout."""
    sizes = np.array([len(layout) for layout in layouts], np.int64)
    starts = (np.cumsum(sizes) - sizes).astype(np.int32)
    pairs = list(zip(layouts, starts, strict=True))
    return TreeLayout(
        ids=_join([tree.ids for tree in layouts]),
        pos=_join([tree.pos for tree in layouts]),
        parent=_join([np.where(tree.parent < 0, np.int32(-1), tree.parent + start) for tree, start in pairs]),
        end=_join([tree.end + start for tree, start in pairs]),
        turns=_join([tree.turns for tree in layouts]),
        lengths=_join([tree.lengths for tree in layouts]),
        index=_join([tree.index + start for tree, start in pairs]),
        routes=_join_routes(layouts),
    )


def check_layout(layout: TreeLayout) -> None:
    """Raises `BatchError` naming the field unless the invariant of this module holds; O(N), vectorised."""
    size = len(layout)
    for name in ("pos", "parent", "end"):
        if len(getattr(layout, name)) != size:
            raise BatchError(f"{name} has {len(getattr(layout, name))} entries for {size} tokens")
    at = np.arange(size)
    if (layout.ids < 0).any():
        raise BatchError("ids holds a negative token id")
    if ((layout.parent < -1) | (layout.parent >= at)).any():
        raise BatchError("parent does not point backwards")
    if ((layout.end <= at) | (layout.end > size)).any():
        raise BatchError("end leaves the row")
    _check_tree(layout, at)
    _check_turns(layout)


def _check_tree(layout: TreeLayout, at: NDArray[np.int64]) -> None:
    child = layout.parent >= 0
    above = layout.parent[child]
    depth = np.zeros(len(layout), np.int64)
    depth[child] = layout.pos[above] + 1
    if (layout.pos != depth).any():
        raise BatchError("pos is not the depth on the path")
    if ((at[child] >= layout.end[above]) | (layout.end[child] > layout.end[above])).any():
        raise BatchError("end does not enclose a descendant")
    # Every ancestor pair is visible by the test above; equal counts make the two sets one.
    if int((layout.end - at).sum()) != int((layout.pos.astype(np.int64) + 1).sum()):
        raise BatchError("end lets a token see another branch")


def _check_turns(layout: TreeLayout) -> None:
    if len(layout.turns) != len(layout.lengths) or (layout.lengths < 1).any():
        raise BatchError("turn_len does not give every turn at least one token")
    if int(layout.lengths.sum()) != len(layout.index):
        raise BatchError(f"index has {len(layout.index)} entries, turn_len says {int(layout.lengths.sum())}")
    if ((layout.index < 0) | (layout.index >= len(layout))).any():
        raise BatchError("index leaves the row")
    inside = np.ones(len(layout.index), bool)
    inside[np.cumsum(layout.lengths) - layout.lengths] = False
    following = np.flatnonzero(inside)
    if (layout.parent[layout.index[following]] != layout.index[following - 1]).any():
        raise BatchError("index does not follow one path inside a turn")
    if (layout.parent[layout.index] < 0).any():
        raise BatchError("index names a root, which no token predicts")


def _join_routes(layouts: Sequence[TreeLayout]) -> Routes | None:
    """None if no layout has any. `BatchError` if they are of models of different shapes."""
    widths = {tree.routes.shape[1] for tree in layouts if tree.routes is not None}
    if not widths:
        return None
    if len(widths) > 1:
        raise BatchError(f"routed experts are {sorted(widths)} wide: of different models")
    width = widths.pop()
    return np.concatenate(
        [np.full((len(tree), width), MISSING) if tree.routes is None else tree.routes for tree in layouts]
    )


def _join(arrays: Sequence[Ints]) -> Ints:
    return np.concatenate([np.empty(0, np.int32), *arrays]).astype(np.int32)
