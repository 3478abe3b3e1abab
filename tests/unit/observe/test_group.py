"""A group's positions and gaps: any order, any repetition; a gap is named once, at the first stage that lacks it."""

from __future__ import annotations

import random

from kat_stream.log.base import Delivered, Position
from kat_stream.observe.group import GroupTrace
from tests.unit.records import request, reward, trajectory, turn
from topics import GroupMember, PackedBatch, Record

GROUP = "r-t000000"


def told(*records: Record) -> GroupTrace:
    """From these records and their repetitions, in a wild order."""
    found = GroupTrace(GROUP)
    messages = [
        (Delivered(Position("any", 0, offset), None, b"", {}, 1_790_000_000_000 + offset), record)
        for offset, record in enumerate(records)
    ]
    messages += messages[:2]
    random.Random(3).shuffle(messages)
    for delivered, record in messages:
        found.apply(delivered, record)
    return found


def batch(*names: str) -> PackedBatch:
    members = tuple(GroupMember(rollout_id=name, fate="packed") for name in names)
    return PackedBatch(run="r", group_id=GROUP, task_id="task", members=members, rows=(), flat_tokens=0, tree_tokens=0)


def test_each_member_is_missed_at_the_first_stage_that_lacks_it() -> None:
    asked = [request(GROUP, sample, 5) for sample in range(5)]
    found = told(
        *asked[1:],
        trajectory(asked[2]),
        trajectory(asked[3]),
        reward(asked[3], 1.0),
        trajectory(asked[4], outcome="infra_error"),
        trajectory(request("other", 0, 9)),
    )
    assert found.gaps() == [
        f"{GROUP}-0 was never requested",
        f"{GROUP}-1 has not ended",
        f"{GROUP}-2 is not graded",
        f"{GROUP}-3 is not packed",
        f"{GROUP}-4 is not packed",
    ]
    assert [line for line in found.lines() if line.startswith("gap")] == [f"gap: {gap}" for gap in found.gaps()]


def test_a_whole_group_has_no_gaps_and_its_lines_are_in_the_order_of_time() -> None:
    asked = request(GROUP, 0, 1)
    ended = trajectory(asked, turn(asked, [1], [2]))
    found = told(asked, turn(asked, [1], [2]), turn(asked, [1], [2], name="y"), ended, reward(asked, 1.0),
                 batch(asked.rollout_id), turn(asked, [], [], name="z", side="end"))  # fmt: skip
    first, *events, turns, last = found.lines()
    assert (first, last) == (f"group {GROUP}", "no gaps")
    assert [line.split()[3].rstrip(":") for line in events] == ["0", "3", "4", "5"]
    assert turns == "2 turns: turns[0] at 1 to 2"


def test_an_unknown_group_is_unknown() -> None:
    assert not told(request("other")).known
