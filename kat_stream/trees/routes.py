"""Routed experts of a mixture of experts, as the engine recorded them: from turns to the unique tokens of a tree.

The experts of a token are one row, uint16[W], W = hidden layers * experts a token; the last token of a call never ran
in its engine and has none. A turn's rows are pieces of consecutive positions from the root, views of what its
ancestors recorded.
Invariant (which turn's routing a shared token takes): that of the first turn, in the order of the rows, that sampled it
and has a row of it; if none has, of the first turn whose prompt holds it. A token without a row holds MISSING and is
routed by the learner itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from kat_stream.errors import BatchError
from kat_stream.trees.layout import MISSING, Routes, TreeLayout

Pieces = tuple[Routes, ...]
"""Rows of consecutive positions from 0 on, uint16[n_i, W]; empty: nothing was recorded."""


def first_rows(pieces: Pieces, count: int) -> Pieces:
    """The first `count` rows, without a copy."""
    return tuple(piece[: stop - start] for piece, start, stop in _spans(pieces, 0, count))


def unknown(count: int, width: int) -> Routes:
    """uint16[count, width] of MISSING that takes no memory."""
    return np.broadcast_to(MISSING, (count, width))


def with_routes(row: TreeLayout, turns: Sequence[Pieces]) -> TreeLayout:
    """The row with the experts of its tokens, given those of its turns in its own order; itself if there are none.

    `BatchError` if turns recorded rows of different widths.
    """
    widths = {piece.shape[1] for pieces in turns for piece in pieces}
    if not widths:
        return row
    if len(widths) > 1:
        raise BatchError(f"routed experts are {sorted(widths)} wide: of different models")
    routes = np.full((len(row), widths.pop()), MISSING)
    paths = [row.path_to(int(row.tokens_of(number)[-1])) for number in range(len(turns))]
    cuts = [len(path) - int(length) for path, length in zip(paths, row.lengths, strict=True)]
    for path, pieces, cut in zip(paths, turns, cuts, strict=True):
        _fill(routes, path, pieces, cut, len(path))
    for path, pieces, cut in zip(paths, turns, cuts, strict=True):
        _fill(routes, path, pieces, 0, cut)
    return replace(row, routes=routes)


def check_routes(rows: Sequence[TreeLayout], width: int, experts: int) -> None:
    """`BatchError` naming the row whose routing is of another model than one of this width and so many experts."""
    for number, row in enumerate(rows):
        if row.routes is None:
            continue
        if row.routes.shape[1] != width:
            raise BatchError(f"row {number}: routed experts are {row.routes.shape[1]} wide, the model's {width}")
        known = row.routes != MISSING
        if (known.any(1) & ~known.all(1)).any():
            raise BatchError(f"row {number}: a token is routed in some layers and not in others")
        if (row.routes[known] >= experts).any():
            raise BatchError(f"row {number}: routed to an expert that is none of {experts}")


def without_routes(rows: Sequence[TreeLayout]) -> tuple[TreeLayout, ...]:
    """The rows for a learner that routes every token itself."""
    return tuple(replace(row, routes=None) for row in rows)


def _fill(routes: Routes, path: NDArray[np.int64], pieces: Pieces, low: int, high: int) -> None:
    """Rows of depths [low, high) of a path for those of its tokens that have none yet."""
    for rows, start, stop in _spans(pieces, low, high):
        tokens = path[start:stop]
        fresh = routes[tokens, 0] == MISSING
        routes[tokens[fresh]] = rows[fresh]


def _spans(pieces: Pieces, low: int, high: int) -> Iterator[tuple[Routes, int, int]]:
    """(rows, first position, one past the last) of what the pieces hold of positions [low, high)."""
    begin = 0
    for piece in pieces:
        start, stop = max(low, begin), min(high, begin + len(piece))
        if start < stop:
            yield piece[start - begin : stop - begin], start, stop
        begin += len(piece)
