"""Records to turns, and batches to bytes and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kat_stream.errors import BatchError, TurnError
from kat_stream.trees import TrainBatch, TurnTokens, from_arrays, make_batch, merge, to_arrays, turns_of
from kat_stream.trees.wire import ROW_FIELDS, arrays_of
from topics.batch import PackedRow
from topics.turn import Turn, VersionSpan

Build = Callable[..., Any]


def record(turn_id: str, prompt: list[int], sampled: list[int], parent: str = "", prefix_len: int = 0) -> Turn:
    return Turn(
        run="run",
        group_id="g",
        rollout_id="r",
        session_id="s",
        turn_id=turn_id,
        index=0,
        parent=parent,
        prefix_len=prefix_len,
        prompt_ids=np.array(prompt, "<i4").tobytes(),
        sampled_ids=np.array(sampled, "<i4").tobytes(),
        logprobs=np.full(len(sampled), -1, "<f4").tobytes(),
        spans=(VersionSpan("a.1", 0, len(sampled)),),
        finish_reason="stop",
    )


def equal(one: TrainBatch, other: TrainBatch) -> bool:
    names = ("ids", "pos", "parent", "end", "turns", "lengths", "index")
    rows = zip(one.rows, other.rows, strict=True)
    same_rows = all(np.array_equal(getattr(a, n), getattr(b, n)) for a, b in rows for n in names)
    arrays = ("logprobs", "advantage", "weight", "rollout")
    return same_rows and all(np.array_equal(getattr(one, n), getattr(other, n)) for n in arrays)


def test_deltas_become_full_paths() -> None:
    turns = turns_of([record("a", [1, 2], [3, 4]), record("b", [5], [6], "a", 4), record("c", [7], [8], "a", 2)])
    assert [t.prompt_ids.tolist() for t in turns] == [[1, 2], [1, 2, 3, 4, 5], [1, 2, 7]]
    assert turns[0].versions == (VersionSpan("a.1", 0, 2),)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (record("b", [5], [6], "z", 1), "turn b: parent 'z' is not among"),
        (record("b", [5], [6], "a", 9), "turn b: prefix_len 9 is no prefix of its parent's 3 tokens"),
        (record("b", [5], [6], "", 2), "turn b: prefix_len is 2, but it has no parent"),
    ],
)
def test_a_prompt_that_is_no_prefix_is_refused(bad: Turn, message: str) -> None:
    with pytest.raises(TurnError, match=message):
        turns_of([record("a", [1, 2], [3]), bad])


def test_a_batch_survives_the_wire_record(grow: Build, batch_of: Build) -> None:
    rng = np.random.default_rng(3)
    batch = batch_of(grow(rng, 12), rng)
    assert len(batch.rows) > 1
    rows = [PackedRow(**{name: array.tobytes() for name, array in row.items()}) for row in to_arrays(batch)]
    assert equal(batch, from_arrays([arrays_of(row) for row in rows], batch.rollout_ids))


def test_turn_arrays_follow_the_rows(grow: Build) -> None:
    """Whatever order packing chose, each turn keeps its own log-probs, advantage and rollout."""
    rng = np.random.default_rng(4)
    turns: list[TurnTokens] = grow(rng, 15)
    number = np.arange(len(turns))
    batch = make_batch(
        turns,
        rollout=number,
        advantage=number,
        weight=number + 1,
        rollout_ids=[t.turn_id for t in turns],
        budget_tokens=30,
    )
    sampled = np.concatenate([row.ids[row.index] for row in batch.rows])
    cuts = np.cumsum(batch.lengths)[:-1]
    pairs = zip(batch.rollout, np.split(sampled, cuts), np.split(batch.logprobs, cuts), strict=True)
    for owner, ids, logprobs in pairs:
        assert ids.tolist() == turns[owner].sampled_ids.tolist()
        assert logprobs.tolist() == turns[owner].logprobs.tolist()
    assert batch.advantage.tolist() == batch.rollout.tolist()
    assert [int(t) for row in batch.rows for t in row.turns] == list(range(len(turns)))


def test_merge_keeps_rollouts_apart(grow: Build, batch_of: Build) -> None:
    rng = np.random.default_rng(5)
    one, other = batch_of(grow(rng, 6), rng), batch_of(grow(rng, 4), rng)
    both = merge([one, other], ages=[0, 1, 2, 3, 4, 5])
    assert both.rollout_ids == one.rollout_ids + other.rollout_ids
    assert both.rollout.tolist() == [*one.rollout.tolist(), *(other.rollout + 3).tolist()]
    assert both.tree_tokens == one.tree_tokens + other.tree_tokens
    assert merge([]).trained_tokens == 0


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("member", lambda a: a + 9, "rollout names none of the 3"),
        ("logprobs", lambda a: a[:-1], "row 0: logprobs has"),
        ("logprobs", lambda a: a * np.float32(np.nan), "not finite"),
        ("weight", lambda a: -a, "negative"),
        ("ids", lambda a: a.astype("<i8"), "row 0: ids is int64"),
        ("end", lambda a: a - 1, "row 0: end"),
        ("turn_len", lambda a: a + 1, "row 0: index has"),
    ],
)
def test_a_broken_row_is_named(grow: Build, batch_of: Build, field: str, change: Build, message: str) -> None:
    rng = np.random.default_rng(6)
    batch = batch_of(grow(rng, 8), rng)
    rows = to_arrays(batch)
    rows[0][field] = change(rows[0][field])
    with pytest.raises(BatchError, match=message):
        from_arrays(rows, batch.rollout_ids)


def test_missing_and_cut_fields_are_named(grow: Build, batch_of: Build) -> None:
    rng = np.random.default_rng(6)
    batch = batch_of(grow(rng, 8), rng)
    rows = to_arrays(batch)
    del rows[0]["member"]
    with pytest.raises(BatchError, match="row 0: member is missing"):
        from_arrays(rows, batch.rollout_ids)
    cut = PackedRow(**dict.fromkeys(ROW_FIELDS, b"\0\0\0"))
    with pytest.raises(BatchError, match="ids has 3 bytes"):
        arrays_of(cut)


def test_arrays_of_another_length_are_refused(grow: Build, batch_of: Build) -> None:
    rng = np.random.default_rng(7)
    batch = batch_of(grow(rng, 5), rng)
    with pytest.raises(BatchError, match="advantage has shape"):
        replace(batch, advantage=batch.advantage[:-1])
    with pytest.raises(BatchError, match="2 ages for 3 rollouts"):
        replace(batch, ages=(1, 2))
