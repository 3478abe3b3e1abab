"""The token tree against a model that keeps whole paths."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from kat_stream.gateway.paths import Node, PathTree, common
from topics.record import pack_ints

IDS = st.lists(st.integers(0, 2), max_size=8)


def _shared(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@given(IDS, IDS)
def test_common_counts_tokens(a: list[int], b: list[int]) -> None:
    assert common(memoryview(pack_ints(a)), memoryview(pack_ints(b))) == _shared(a, b)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=6), IDS, st.booleans()), max_size=10))
def test_a_prompt_is_mounted_under_the_longest_known_prefix(turns: list[tuple[list[int], list[int], bool]]) -> None:
    tree, known = PathTree(), list[tuple[Node, list[int]]]()
    for number, (prompt, sampled, extend) in enumerate(turns):
        prefer = known[-1] if extend and known else None
        ids = [*prefer[1], *prompt] if prefer else prompt
        parent, start = tree.mount(pack_ints(ids), prefer[0] if prefer else None)
        assert start == max((_shared(path, ids) for _, path in known), default=0)
        assert (parent is None) == (start == 0)
        node = tree.add(f"t{number}", parent, start, pack_ints([*ids, *sampled]))
        known.append((node, [*ids, *sampled]))
        for other, path in known:
            assert other.path() == pack_ints(path) and other.length == len(path)


def test_of_equal_siblings_the_oldest_is_the_parent() -> None:
    tree = PathTree()
    first = tree.add("a", None, 0, pack_ints([1, 2, 3]))
    second = tree.add("b", None, 0, pack_ints([1, 2, 4]))
    assert tree.mount(pack_ints([1, 2, 5])) == (first, 2)
    assert tree.mount(pack_ints([1, 2, 4, 5])) == (second, 3)


def test_a_turn_that_sampled_what_another_did_stays_a_place_of_its_own() -> None:
    tree = PathTree()
    first = tree.add("a", None, 0, pack_ints([1, 2, 3]))
    twin = tree.add("b", None, 0, pack_ints([1, 2, 3]))
    assert tree.mount(pack_ints([1, 2, 3, 4])) == (first, 3)
    assert tree.mount(pack_ints([1, 2, 3, 4]), prefer=twin) == (twin, 3)
    child = tree.add("c", twin, 3, pack_ints([1, 2, 3, 4, 5]))
    assert tree.mount(pack_ints([1, 2, 3, 4, 6]), prefer=first) == (child, 4)
    assert child.path() == pack_ints([1, 2, 3, 4, 5])
