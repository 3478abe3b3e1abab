"""Turns to trees and back: nothing is lost, nothing merges that is not equal from the root."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kat_stream.errors import BatchError, TurnError
from kat_stream.trees import TreeLayout, TurnTokens, build_forest, check_layout, concat, pack

Ids = st.lists(st.integers(0, 2), min_size=1, max_size=6)
MakeTurn = Callable[..., TurnTokens]


def make(number: int, prompt: list[int], sampled: list[int]) -> TurnTokens:
    logprobs = np.full(len(sampled), -1.0, np.float32)
    return TurnTokens(str(number), np.array(prompt, np.int32), np.array(sampled, np.int32), logprobs)


def path_to(layout: TreeLayout, token: int) -> list[int]:
    ids = []
    while token >= 0:
        ids.append(int(layout.ids[token]))
        token = int(layout.parent[token])
    return ids[::-1]


def ancestors(layout: TreeLayout, token: int) -> set[int]:
    found = set()
    while token >= 0:
        found.add(token)
        token = int(layout.parent[token])
    return found


@settings(max_examples=150)
@given(st.lists(st.tuples(Ids, Ids), min_size=1, max_size=12))
def test_every_layout_keeps_the_invariant_and_spells_its_turns(pairs: list[tuple[list[int], list[int]]]) -> None:
    turns = [make(k, prompt, sampled) for k, (prompt, sampled) in enumerate(pairs)]
    trees = build_forest(turns)
    prefixes = {tuple((p + s)[: n + 1]) for p, s in pairs for n in range(len(p + s))}
    assert sum(len(tree) for tree in trees) == len(prefixes)
    seen = []
    for tree in trees:
        check_layout(tree)
        for q in range(len(tree)):
            visible = {k for k in range(len(tree)) if k <= q < tree.end[k]}
            assert visible == ancestors(tree, q)
            assert tree.pos[q] == len(visible) - 1
        for k, number in enumerate(tree.turns):
            index = tree.tokens_of(k)
            assert path_to(tree, int(index[-1])) == sum(pairs[number], [])
            assert tree.ids[index].tolist() == pairs[number][1]
            seen.append(int(number))
    assert sorted(seen) == list(range(len(pairs)))


@settings(max_examples=60)
@given(st.lists(st.tuples(Ids, Ids), min_size=1, max_size=12), st.integers(1, 30))
def test_packing_keeps_every_turn_and_the_budget(pairs: list[tuple[list[int], list[int]]], budget: int) -> None:
    turns = [make(k, prompt, sampled) for k, (prompt, sampled) in enumerate(pairs)]
    trees = build_forest(turns)
    rows = pack(trees, budget)
    assert sorted(int(t) for row in rows for t in row.turns) == list(range(len(turns)))
    largest = max(len(tree) for tree in trees)
    for row in rows:
        check_layout(row)
        assert len(row) <= max(budget, largest)
        for k, number in enumerate(row.turns):
            assert path_to(row, int(row.tokens_of(k)[-1])) == sum(pairs[number], [])


def test_siblings_share_their_prompt_and_stay_two_turns(turn: MakeTurn) -> None:
    (tree,) = build_forest([turn("a", [1, 2], [3, 4]), turn("b", [1, 2], [3, 5])])
    assert len(tree) == 5
    assert len(tree.turns) == 2
    shared = set(tree.tokens_of(0)) & set(tree.tokens_of(1))
    assert {int(tree.ids[t]) for t in shared} == {3}


def test_equal_ids_after_different_context_do_not_merge(turn: MakeTurn) -> None:
    """A stripped thought makes the copied answer another node."""
    trees = build_forest([turn("a", [1, 5, 5], [2, 3]), turn("b", [1], [2, 3])])
    assert sum(len(tree) for tree in trees) == 7


def test_flat_tokens_count_leaf_paths_once(turn: MakeTurn) -> None:
    (tree,) = build_forest([turn("a", [1, 2], [3]), turn("b", [1, 2, 3, 4], [5]), turn("c", [1, 2], [6])])
    assert tree.flat_tokens == 5 + 3


def test_untrainable_turns_are_left_out(turn: MakeTurn) -> None:
    trees = build_forest([turn("a", [1], [2]), replace(turn("b", [3], [4]), trainable=False)])
    assert [tree.turns.tolist() for tree in trees] == [[0]]
    assert build_forest([]) == ()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("pos", [0, 1, 1, 2], "pos is not the depth"),
        ("parent", [-1, 0, 2, 2], "parent does not point backwards"),
        ("end", [4, 4, 3, 5], "end leaves the row"),
        ("end", [4, 3, 4, 4], "end does not enclose"),
        ("index", [1, 2, 9], "index leaves the row"),
        ("index", [2, 1, 3], "index does not follow one path"),
        ("ids", [1, -2, 3, 4], "negative token id"),
    ],
)
def test_a_broken_layout_is_named(turn: MakeTurn, field: str, value: list[int], message: str) -> None:
    (tree,) = build_forest([turn("a", [1], [2, 3, 4])])
    check_layout(tree)
    with pytest.raises(BatchError, match=message):
        check_layout(replace(tree, **{field: np.array(value, np.int32)}))


def test_a_mask_that_leaks_into_a_sibling_is_refused(turn: MakeTurn) -> None:
    (tree,) = build_forest([turn("a", [1], [2]), turn("b", [1], [3])])
    with pytest.raises(BatchError, match="another branch"):
        check_layout(replace(tree, end=np.array([3, 3, 3], np.int32)))


def test_a_root_cannot_be_sampled(turn: MakeTurn) -> None:
    (tree,) = build_forest([turn("a", [1], [2])])
    with pytest.raises(BatchError, match="root"):
        check_layout(replace(tree, index=np.array([0], np.int32)))


def test_trees_side_by_side_do_not_see_each_other(turn: MakeTurn) -> None:
    trees = build_forest([turn("a", [1, 2], [3]), turn("b", [2, 2], [3])])
    row = concat(trees)
    check_layout(row)
    assert row.parent.tolist() == [-1, 0, 1, -1, 3, 4]


@pytest.mark.parametrize(
    ("prompt", "sampled", "logprobs", "message"),
    [
        ([], [1], [-1.0], "turn x: prompt_ids is empty"),
        ([1], [], [], "turn x: sampled_ids is empty"),
        ([1], [1, 2], [-1.0], "2 sampled ids"),
        ([1], [1, 2], [-1.0, np.nan], r"turn x: logprobs\[1\] is nan"),
        ([1], [1], [0.5], r"logprobs\[0\] is 0.5"),
        ([1], [-1], [-1.0], "negative id -1"),
    ],
)
def test_a_turn_that_cannot_be_trained_on_is_refused(
    prompt: list[int], sampled: list[int], logprobs: list[float], message: str
) -> None:
    with pytest.raises(TurnError, match=message):
        TurnTokens("x", np.array(prompt, np.int32), np.array(sampled, np.int32), np.array(logprobs, np.float32))
