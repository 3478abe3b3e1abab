"""Turns to token trees: merge by id prefix from the root, number the unique tokens in DFS order.

Invariant: walking `parent` from any sampled token of a turn spells that turn's prompt and sampled ids exactly. Only ids
merge, never turns: two samples that share first tokens by chance share nodes and keep their own log-probs.
Sorting the paths puts them in DFS order, so the trie is the longest common prefixes of neighbours: no node objects.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from kat_stream.trees.layout import TreeLayout
from kat_stream.trees.turns import TurnTokens

Wide = NDArray[np.int64]
Piece = list[int]
"""[first depth, token at that depth, one past the last depth]: a stretch of the current path, without a gap in DFS."""


@dataclass(frozen=True, eq=False, slots=True)
class _Paths:
    """The paths of all trainable turns, sorted. `fresh`: of each, the ids that the one before it does not share."""

    order: Wide
    fresh: list[NDArray[np.int32]]
    length: Wide
    prompt: Wide
    shared: Wide


def build_forest(turns: Sequence[TurnTokens]) -> tuple[TreeLayout, ...]:
    """Trees of all trainable turns, one per distinct first token; their `turns` are indices into `turns`."""
    kept = [number for number, turn in enumerate(turns) if turn.trainable]
    if not kept:
        return ()
    paths = _sort(turns, np.array(kept, np.int64))
    fresh = paths.length - paths.shared
    first = np.cumsum(fresh) - fresh
    parents, end, spans = _walk(paths, first)
    whole = _layout(paths, fresh, first, parents, end, spans)
    return tuple(_split(whole, paths, first))


def _sort(turns: Sequence[TurnTokens], kept: Wide) -> _Paths:
    found = [np.concatenate([turns[i].prompt_ids, turns[i].sampled_ids]) for i in kept]
    # Big-endian bytes compare like the ids themselves, and a path sorts right before its extensions.
    keys = [path.astype(">i4").tobytes() for path in found]
    rank = sorted(range(len(keys)), key=keys.__getitem__)
    paths = [found[i] for i in rank]
    order = kept[np.array(rank, np.int64)]
    shared = [0, *(common_prefix(before, path) for before, path in pairwise(paths))]
    return _Paths(
        order=order,
        fresh=[path[known:] for path, known in zip(paths, shared, strict=True)],
        length=np.array([len(path) for path in paths], np.int64),
        prompt=np.array([len(turns[i].prompt_ids) for i in order], np.int64),
        shared=np.array(shared, np.int64),
    )


def common_prefix(one: NDArray[np.int32], other: NDArray[np.int32]) -> int:
    """How many first ids two paths have in common."""
    size = min(len(one), len(other))
    differ = one[:size] != other[:size]
    first = int(differ.argmax()) if size else 0
    return first if size and differ[first] else size


def _expand(counts: Wide) -> tuple[Wide, Wide]:
    """(owner, offset) of each of sum(counts) elements: [2, 1] -> ([0, 0, 1], [0, 1, 0])."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)


def _walk(paths: _Paths, first: Wide) -> tuple[Wide, NDArray[np.int32], Wide]:
    """DFS over the sorted paths: parent of each path's first new token, subtree ends, and spans of sampled tokens.

    Spans are int64[k, 2] rows (first token, count), turn after turn, in the order of the paths.
    """
    total = int(first[-1] + paths.length[-1] - paths.shared[-1])
    end = np.empty(total, np.int32)
    parents = np.empty(len(first), np.int64)
    pieces: list[Piece] = []
    spans: list[tuple[int, int]] = []
    columns = (paths.shared.tolist(), paths.length.tolist(), paths.prompt.tolist(), first.tolist())
    for number, (shared, length, prompt, token) in enumerate(zip(*columns, strict=True)):
        _cut(pieces, shared, token, end)
        parents[number] = pieces[-1][1] + shared - 1 - pieces[-1][0] if pieces else -1
        if length > shared:
            pieces.append([shared, token, length])
        spans.extend(reversed(list(_cover(pieces, prompt, length))))
    _cut(pieces, 0, total, end)
    return parents, end, np.array(spans, np.int64)


def _cut(pieces: list[Piece], depth: int, token: int, end: NDArray[np.int32]) -> None:
    """The walk leaves everything at or below `depth`: those subtrees end before `token`."""
    while pieces and pieces[-1][2] > depth:
        first, start, stop = pieces[-1]
        keep = max(first, depth)
        end[start + keep - first : start + stop - first] = token
        if keep == first:
            pieces.pop()
        else:
            pieces[-1][2] = depth


def _cover(pieces: list[Piece], low: int, high: int) -> Iterator[tuple[int, int]]:
    """(first token, count) of depths [low, high) of the current path, deepest first."""
    for first, token, stop in reversed(pieces):
        begin, finish = max(first, low), min(stop, high)
        if finish > begin:
            yield token + begin - first, finish - begin
        if first <= low:
            return


def _layout(paths: _Paths, fresh: Wide, first: Wide, parents: Wide, end: NDArray[np.int32], spans: Wide) -> TreeLayout:
    owner, offset = _expand(fresh)
    pos = paths.shared[owner] + offset
    parent = np.arange(-1, len(pos) - 1)
    new = fresh > 0
    parent[first[new]] = parents[new]
    span, step = _expand(spans[:, 1])
    return TreeLayout(
        ids=np.concatenate(paths.fresh),
        pos=pos.astype(np.int32),
        parent=parent.astype(np.int32),
        end=end,
        turns=paths.order.astype(np.int32),
        lengths=(paths.length - paths.prompt).astype(np.int32),
        index=(spans[span, 0] + step).astype(np.int32),
    )


def _split(whole: TreeLayout, paths: _Paths, first: Wide) -> Iterator[TreeLayout]:
    """One layout per root."""
    roots = np.flatnonzero(paths.shared == 0)
    turn_cuts = np.append(roots, len(whole.turns))
    token_cuts = np.append(first[roots], len(whole))
    index_cuts = np.concatenate([[0], np.cumsum(whole.lengths)])[turn_cuts]
    for k in range(len(roots)):
        low, high = int(token_cuts[k]), int(token_cuts[k + 1])
        turns = slice(turn_cuts[k], turn_cuts[k + 1])
        yield TreeLayout(
            ids=whole.ids[low:high],
            pos=whole.pos[low:high],
            parent=np.maximum(whole.parent[low:high] - low, -1).astype(np.int32),
            end=(whole.end[low:high] - low).astype(np.int32),
            turns=whole.turns[turns],
            lengths=whole.lengths[turns],
            index=(whole.index[index_cuts[k] : index_cuts[k + 1]] - low).astype(np.int32),
        )
