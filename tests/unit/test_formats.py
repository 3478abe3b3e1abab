"""Formats of ids: every sampled token is learned exactly once, in the context that it was sampled in."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cache

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kat_stream.env import plugins
from kat_stream.env.manager import FAILED, GROUP, Format, Policy, Rollout, Row, Rules, apply_rules, rollout_of
from kat_stream.env.manager.where import parse_where
from kat_stream.errors import ConfigError, TurnError
from kat_stream.trees import turns_of
from tests.unit import records
from tests.unit.records import request, trajectory
from topics import Turn
from topics.record import pack_floats

ASKED = request()
DEMO = Policy("demo")
Learned = Counter[tuple[tuple[int, ...], int, float]]
"""(context, token, log-probability)"""


@cache
def format_named(name: str) -> Format:
    found: Format = plugins.load(GROUP, name)
    return found


def turn(
    number: int,
    prompt: Sequence[int],
    sampled: Sequence[int],
    parent: int | None = None,
    prefix: int = 0,
    **fields: object,
) -> Turn:
    """Each sampled token of a rollout has a log-probability of its own."""
    logprobs = pack_floats([-(number * 16 + i + 1) / 1024 for i in range(len(sampled))])
    before = {"parent": "" if parent is None else f"t{parent}", "prefix_len": prefix}
    return records.turn(
        ASKED, prompt, sampled, name=f"t{number}", **{"index": number, "logprobs": logprobs, **before, **fields}
    )


@st.composite
def rollouts(draw: st.DrawFn) -> Rollout:
    """Trees of turns over three ids, so that branches also meet by chance; some turns are not trainable."""
    ids = st.lists(st.integers(0, 2), min_size=1, max_size=4)
    lengths: list[int] = []
    turns: list[Turn] = []
    for number in range(draw(st.integers(1, 9))):
        parent = draw(st.sampled_from([None, *range(number)]))
        whole = 0 if parent is None else lengths[parent]
        prefix = draw(st.sampled_from([whole, draw(st.integers(0, whole))]))
        prompt, sampled = draw(ids), draw(ids)
        lengths.append(prefix + len(prompt) + len(sampled))
        thread = draw(st.sampled_from("ab"))
        turns.append(
            turn(number, prompt, sampled, parent, prefix, trainable=draw(st.integers(0, 5)) > 0, thread=thread)
        )
    return rollout_of(trajectory(ASKED, *turns), 1.0)


def sampled_by(rollout: Rollout) -> Learned:
    """What should be learned, from the records alone."""
    found: Learned = Counter()
    for number, tokens in enumerate(turns_of(rollout.trajectory.turns)):
        if number in rollout.kept:
            for i, (token, logprob) in enumerate(zip(tokens.sampled_ids, tokens.logprobs, strict=True)):
                found[(*tokens.prompt_ids.tolist(), *tokens.sampled_ids[:i].tolist()), int(token), float(logprob)] += 1
    return found


def learned_in(rows: Sequence[Row]) -> Learned:
    found: Learned = Counter()
    for row in rows:
        ids, labels = row["input_ids"].tolist(), row["labels"].tolist()
        for at, label in enumerate(labels):
            if label != -100:
                found[tuple(ids[:at]), label, float(row["logprobs"][at])] += 1
            else:
                assert row["logprobs"][at] == 0
    return found


def learned_in_trees(rows: Sequence[Row]) -> Learned:
    found: Learned = Counter()
    for row in rows:
        for token, logprob in zip(row["index"], row["logprobs"], strict=True):
            context, at = [], row["parent"][token]
            while at >= 0:
                context.append(int(row["ids"][at]))
                at = row["parent"][at]
            found[tuple(context[::-1]), int(row["ids"][token]), float(logprob)] += 1
    return found


@given(rollouts(), st.sampled_from(["completed", "thread", "branch"]), st.integers(4, 30), st.integers(1, 4))
def test_every_sampled_token_is_learned_exactly_once(made: Rollout, order: str, tokens: int, depth: int) -> None:
    for rules in (Rules(), Rules(order, tokens, depth)):  # type: ignore[arg-type]
        rollout = apply_rules(made, rules, DEMO.decode)
        expected = sampled_by(rollout)
        for name in ("per-turn", "linear"):
            assert learned_in(list(format_named(name).rows(rollout, DEMO))) == expected
        assert learned_in_trees(list(format_named("tree").rows(rollout, DEMO))) == expected
        assert learned_in(list(format_named("longest-branch").rows(rollout, DEMO))) <= expected


@given(rollouts())
def test_lines_are_as_few_as_exact_prefixes_permit_and_the_longest_branch_is_the_longest(rollout: Rollout) -> None:
    lines = list(format_named("linear").rows(rollout, DEMO))
    assert sum(len(line["turn_ids"]) for line in lines) == len(rollout.kept) >= len(lines)
    longest = list(format_named("longest-branch").rows(rollout, DEMO))
    sizes = [len(step.ids) for step in rollout.learned()]
    assert [len(row["input_ids"]) for row in longest] == ([max(sizes)] if sizes else [])


@given(rollouts(), st.integers(4, 20), st.integers(1, 3))
def test_rules_leave_turns_out_whole(made: Rollout, tokens: int, depth: int) -> None:
    rollout = apply_rules(made, Rules("branch", tokens, depth), DEMO.decode)
    fitting = {n for n in made.kept if len(made.steps[n].ids) <= tokens and made.steps[n].depth <= depth}
    assert set(rollout.kept) == fitting and len(rollout.kept) == len(fitting)


def forked() -> Rollout:
    """t0 -> t1 -> t3, and t2 beside t1, of another thread."""
    turns = [
        turn(0, [5, 6], [7], thread="main"),
        turn(1, [8], [9], 0, 3, thread="main"),
        turn(2, [4], [4], 0, 3, thread="sub"),
        turn(3, [1], [2], 1, 5, thread="main"),
    ]
    return rollout_of(trajectory(ASKED, *turns), 1.0)


def test_a_branch_begins_a_line_of_its_own() -> None:
    first, second = format_named("linear").rows(forked(), DEMO)
    assert first["input_ids"].tolist() == [5, 6, 7, 8, 9, 1, 2]
    assert first["labels"].tolist() == [-100, -100, 7, -100, 9, -100, 2]
    assert second["input_ids"].tolist() == [5, 6, 7, 4, 4]
    assert second["labels"].tolist() == [-100, -100, -100, -100, 4]
    assert (first["turn_ids"], second["turn_ids"]) == (["t0", "t1", "t3"], ["t2"])


@pytest.mark.parametrize(
    ("order", "expected"), [("completed", (0, 1, 2, 3)), ("thread", (0, 1, 3, 2)), ("branch", (0, 1, 3, 2))]
)
def test_orders(order: str, expected: tuple[int, ...]) -> None:
    assert apply_rules(forked(), Rules(order), DEMO.decode).kept == expected  # type: ignore[arg-type]


def test_a_turn_without_a_name_is_ordered_too() -> None:
    """Foreign bytes decode to it: it was taken for its own child, for ever."""
    made = rollout_of(trajectory(ASKED, msgspec.structs.replace(turn(0, [1], [2]), turn_id=""), turn(1, [1], [3])), 1.0)
    assert apply_rules(made, Rules("branch"), DEMO.decode).kept == (0, 1)


def test_a_failed_call_is_context_and_not_learned() -> None:
    results = {1: "[exit 0]", 2: "Traceback\n[exit 1]"}
    turns, size = [turn(0, [1], [2])], 2
    for number, text in results.items():
        ids = DEMO.renderer.encode(text)
        size += len(ids) // 4
        told = np.frombuffer(ids, "<i4").tolist()
        turns.append(turn(number, told, [3], number - 1, size - len(told), ill_formed=False))
        size += 1
    turns.append(turn(3, [1], [3], ill_formed=True))
    rules = Rules(failed=re.compile(r"\[exit [1-9]"))
    rollout = apply_rules(rollout_of(trajectory(ASKED, *turns), None), rules, DEMO.decode)
    assert (rollout.kept, rollout.failed) == ((0, 2), {1, 3})
    (line,) = format_named("linear").rows(rollout, DEMO)
    assert line["turn_ids"] == ["t0", "t2"] and (line["labels"] != -100).sum() == 2


@pytest.mark.parametrize(
    ("result", "failed"),
    [
        ("a.py\n[exit 0]", False),
        ("[exit 127]", True),
        ("<returncode>0</returncode>", False),
        ("<returncode>1</returncode>", True),
        ('{"returncode": 0, "output": "x"}', False),
        ('{"returncode": 2, "output": "x"}', True),
        ("Output: a\nExit Code: 0\nSignal: none", False),
        ("Output: a\nExit Code: 1\nSignal: none", True),
        ("[Command finished with exit code 0.]", False),
        ("[Command finished with exit code 10.]", True),
        ("Traceback\nKeyError: 'a'", True),
    ],
)
def test_how_agents_say_that_a_call_failed(result: str, failed: bool) -> None:
    assert (re.search(FAILED, result) is not None) is failed


def test_an_ancestor_that_was_cut_is_learned_as_far_as_it_stands() -> None:
    made = rollout_of(trajectory(ASKED, turn(0, [5], [6, 7, 8]), turn(1, [1, 1, 1, 1], [2], 0, 3)), 1.0)
    (row,) = format_named("longest-branch").rows(made, DEMO)
    assert row["labels"].tolist() == [-100, 6, 7, -100, -100, -100, -100, 2]


def test_a_turn_without_its_parent_is_refused_by_name() -> None:
    with pytest.raises(TurnError, match="t1: parent 't0'"):
        rollout_of(trajectory(ASKED, turn(1, [1], [2], 0, 1)), None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", True),
        ("score>=1", True),
        ("score < 1", False),
        ("score=1 and turns==4 and tokens<=7", True),
        ("outcome!=submitted", False),
        ("task=task and scaffold=shell", True),
    ],
)
def test_where(text: str, expected: bool) -> None:
    assert all(condition.holds(forked()) for condition in parse_where(text)) is expected


def test_what_was_not_graded_has_no_score_to_compare() -> None:
    ungraded = rollout_of(forked().trajectory, None)
    assert not parse_where("score<1")[0].holds(ungraded) and not parse_where("score!=1")[0].holds(ungraded)


@pytest.mark.parametrize("bad", ["scores>=1", "score", "score>=good", "score>=1 or turns>2"])
def test_a_condition_that_is_none_is_refused(bad: str) -> None:
    with pytest.raises(ConfigError, match="--where"):
        parse_where(bad)
