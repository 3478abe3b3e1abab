"""Squares and rectangles are the tree's attention: every visible pair once, no other; by brute force."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kat_stream.trees import build_forest, concat, partition, with_path
from kat_stream.trees.slices import cut_slices
from tests.benchmarks.tree_rivals import apart, as_batch
from tests.benchmarks.tree_shapes import grown, longest, shape_of, star

Build = Callable[..., Any]


@pytest.mark.parametrize("budget", [10_000, 25, 7, 1])
@pytest.mark.parametrize("seed", range(8))
def test_every_visible_pair_lies_in_exactly_one(grow: Build, seed: int, budget: int) -> None:
    row = concat(build_forest(grow(np.random.default_rng(seed), 25)))
    for part in partition(row, budget):
        below, above = with_path(row, part) if budget < len(row) else (row, 0)
        slices = cut_slices(below, above)
        seen = np.zeros((len(below) - above, len(below)), int)
        for start, stop in slices.runs:
            seen[start:stop, start + above : stop + above] += np.tri(stop - start, dtype=int)
        for (start, stop), (first, last) in slices.branches:
            seen[start:stop, first:last] += 1
        query, key = np.arange(above, len(below))[:, None], np.arange(len(below))
        assert (seen == ((key <= query) & (query < below.end))).all()
        assert slices.pairs == seen.sum()
        assert [stop for _, stop in slices.runs] == [*(start for start, _ in slices.runs[1:]), len(seen)]


def test_calls_grow_with_leaves_not_with_nodes() -> None:
    """A chain is one square; a star of n paths n squares and one rectangle."""
    rng = np.random.default_rng(0)
    (chain,) = build_forest(grown([[-1, 0, 5, 3], [0, 8, 4, 2], [1, 14, 0, 6]], rng))
    assert (cut_slices(chain).runs, cut_slices(chain).branches) == (((0, 20),), ())
    (tree,) = build_forest(grown([[-1, 0, 9, 2], *[[0, 7, 2, 2]] * 4], rng))
    assert len(cut_slices(tree).runs) == 5
    assert cut_slices(tree).branches == (((11, 27), (0, 7)),)


@pytest.mark.parametrize("por", [0.2, 0.6, 0.9])
def test_benchmarked_stars_have_the_por_and_rivals_the_same_turns(por: float) -> None:
    shape = star(por, 128)
    turns = grown(shape, np.random.default_rng(0))
    batch = as_batch(turns, [*range(len(turns))], 10**6)
    assert batch.flat_tokens == len(shape) * longest(shape)
    assert 1 - batch.tree_tokens / batch.flat_tokens == pytest.approx(por, abs=0.01)
    rival = apart(batch)
    assert (rival.tree_tokens, rival.trained_tokens) == (batch.flat_tokens, batch.trained_tokens)
    assert sorted(rival.advantage) == sorted(batch.advantage)
    for row, k in ((row, int(row.turns[0])) for row in rival.rows):
        turn = turns[round(float(rival.advantage[k]))]
        assert (row.ids[row.tokens_of(0)] == turn.sampled_ids).all()


def test_a_shape_is_kept_by_growing_and_reading_it(grow: Build) -> None:
    shape = shape_of(grow(np.random.default_rng(3), 30))
    assert shape_of(grown(shape, np.random.default_rng(1))) == shape
