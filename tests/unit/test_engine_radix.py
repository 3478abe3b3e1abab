"""The radix tree against a plain dictionary of prefixes, over random histories with shared prefixes."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kat_stream.engines.embedded.radix import RadixCache
from kat_stream.trees.forest import common_prefix

SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=25)


def fill(cache: RadixCache, sequences: list[list[int]]) -> tuple[dict[tuple[int, ...], int], list[int]]:
    """Insert the sequences with fresh slots; returns the slot of every prefix and the slots that came back."""
    model: dict[tuple[int, ...], int] = {}
    returned: list[int] = []
    fresh = 0
    for sequence in sequences:
        slots = np.arange(fresh, fresh + len(sequence))
        fresh += len(sequence)
        returned += cache.insert(np.array(sequence, np.int32), slots).tolist()
        for end, slot in enumerate(slots.tolist(), start=1):
            model.setdefault(tuple(sequence[:end]), slot)
    return model, returned


@given(SEQUENCES)
@settings(max_examples=150)
def test_match_finds_exactly_what_was_inserted(sequences: list[list[int]]) -> None:
    cache = RadixCache()
    model, returned = fill(cache, sequences)
    assert cache.size == cache.evictable == len(model)
    assert sorted([*model.values(), *returned]) == list(range(sum(map(len, sequences))))
    for sequence in sequences:
        probe = [*sequence, 7]
        slots, _ = cache.match(np.array(probe, np.int32))
        assert slots.tolist() == [model[tuple(sequence[:end])] for end in range(1, len(sequence) + 1)]
        assert cache.match_length(np.array(probe, np.int32)) == len(sequence)


@given(SEQUENCES, st.data())
@settings(max_examples=150)
def test_eviction_spares_locked_prefixes_and_gives_every_other_slot_back_once(
    sequences: list[list[int]], data: st.DataObject
) -> None:
    cache = RadixCache()
    model, _ = fill(cache, sequences)
    kept = data.draw(st.sampled_from(sequences))
    slots, node = cache.match(np.array(kept, np.int32))
    cache.lock(node)
    locked = set(slots.tolist())
    assert cache.evictable == len(model) - len(locked)
    some = cache.evict(data.draw(st.integers(0, len(model))))
    rest = cache.evict(len(model))
    freed = [*some, *rest]
    assert len(freed) == len(set(freed))
    assert set(freed) == set(model.values()) - locked
    assert cache.match(np.array(kept, np.int32))[0].tolist() == slots.tolist()
    cache.unlock(node)
    assert set(cache.evict(len(model))) == locked
    assert cache.size == cache.evictable == 0


def test_the_least_recently_used_leaf_goes_first() -> None:
    cache = RadixCache()
    for start, sequence in enumerate([[1, 2], [3, 4], [5, 6]]):
        cache.insert(np.array(sequence, np.int32), np.arange(2) + 2 * start)
    cache.match(np.array([1, 2], np.int32))
    assert sorted(cache.evict(1)) == [2, 3]
    assert sorted(cache.evict(1)) == [4, 5]
    assert sorted(cache.evict(1)) == [0, 1]


def test_common_prefix() -> None:
    left = np.array([1, 2, 3], np.int32)
    assert common_prefix(left, np.array([1, 2, 4, 5], np.int32)) == 2
    assert common_prefix(left, left[:2]) == 2
    assert common_prefix(left, np.array([9], np.int32)) == 0
    assert common_prefix(left, left[:0]) == 0
