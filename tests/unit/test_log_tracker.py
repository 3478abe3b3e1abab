"""The tracker: any completion order, a crash at any point, and the next life delivers exactly what was unfinished."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kat_stream.log.base import Committed
from kat_stream.log.tracker import METADATA_LIMIT, Tracker, decode_runs, encode_runs

# Offsets with gaps, as transaction markers leave them, and how each life goes: how far it reads, what it finishes.
offsets = st.lists(st.integers(0, 60), unique=True, max_size=40).map(sorted)
lives = st.lists(st.tuples(st.integers(0, 40), st.lists(st.integers(0, 40))), max_size=6)


@given(offsets, lives)
def test_exactly_the_unfinished_is_delivered_again(log: list[int], lives: list[tuple[int, list[int]]]) -> None:
    committed, finished = Committed(0), set[int]()
    for reads, finishes in [*lives, (len(log), list(range(41)))]:
        tracker = Tracker(committed)
        opened = [o for o in [o for o in log if o >= committed.offset][:reads] if tracker.take(o)]
        assert finished.isdisjoint(opened)
        for index in dict.fromkeys(finishes):
            if index < len(opened):
                tracker.finish(opened[index])
                finished.add(opened[index])
        committed = tracker.commit()
        assert all(o in finished for o in log if o < committed.offset)
        assert tracker.open == len(opened) - len(finished & set(opened))
    last = Tracker(committed)
    assert [o for o in log if o >= committed.offset and last.take(o)] == [o for o in log if o not in finished]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5))), st.integers(0, 9))
def test_runs_survive_the_metadata(lengths: list[tuple[int, int]], low: int) -> None:
    runs, at = [], low
    for unfinished, finished in lengths:
        runs.append((at + unfinished, at + unfinished + finished))
        at = runs[-1][1]
    assert decode_runs(Committed(low, encode_runs(low, runs))) == runs


def test_metadata_is_capped_and_what_does_not_fit_is_repeated() -> None:
    tracker = Tracker(Committed(0))
    for offset in range(4000):
        assert tracker.take(offset)
    for offset in range(1, 4000, 2):
        tracker.finish(offset)
    committed = tracker.commit()
    assert committed.offset == 0
    assert len(committed.metadata) <= METADATA_LIMIT and committed.metadata.isascii()
    again = Tracker(committed)
    repeated = [offset for offset in range(4000) if again.take(offset)]
    assert set(range(0, 4000, 2)) < set(repeated) and 1 not in repeated


def test_foreign_metadata_says_nothing() -> None:
    assert decode_runs(Committed(7, "somebody else's")) == []


def test_a_message_is_finished_once() -> None:
    tracker = Tracker(Committed(0))
    assert tracker.take(3) and not tracker.take(3)
    tracker.finish(3)
    with pytest.raises(ValueError, match="3 is not open"):
        tracker.finish(3)
    tracker.advance(9)
    assert tracker.commit() == Committed(9)
