"""A group becomes one batch: each member has one fate, and only good members reach the gradient."""

from dataclasses import replace as replace_rules

import numpy as np
import pytest
from msgspec.structs import replace

from kat_stream.errors import BatchError
from kat_stream.rl.group import GroupRules, pack_group
from kat_stream.rl.scores import ScoreRules
from kat_stream.rl.step import assemble, check_group
from tests.unit.records import request, reward, trajectory, turn
from topics import Reward, Score, Trajectory, VersionSpan
from topics.record import pack_floats

RULES = GroupRules(staleness=1, budget_tokens=100, max_positions=32)
UNGRADED = reward(request(size=3), 0.0, status="failed", error_class="SandboxUnavailable")
"""The verifier could not grade: no score, and never read as 0."""


def member(sample: int, score: float | None, size: int = 3, **fields: object) -> tuple[Trajectory, Reward | None]:
    asked = request(sample=sample, size=size)
    version = str(fields.pop("version", "a.0"))
    made = trajectory(asked, turn(asked, [1, 2, 3], [10 + sample, 4], version=version), **fields)
    return made, None if score is None else reward(asked, score)


def fates(*members: tuple[Trajectory, Reward | None], head: str = "a.0") -> list[tuple[str, str]]:
    return [(m.fate, m.reason.partition(":")[0]) for m in pack_group(members, head, {}, RULES).members]


def test_advantages_are_rewards_less_their_mean_and_prompts_are_shared() -> None:
    batch = pack_group([member(0, 1.0), member(1, 0.0), member(2, 0.5)], "a.0", {}, RULES)
    step = assemble([batch], "a.0", {}, 1)
    assert dict(zip(step.batch.rollout, step.batch.advantage, strict=True)) == {0: 0.5, 1: -0.5, 2: 0.0}
    assert batch.flat_tokens == 15
    assert batch.tree_tokens == 9
    assert step.trained == ("r-t000000-0", "r-t000000-1", "r-t000000-2")
    assert step.reward_mean == 0.5


def test_failures_of_our_side_are_outside_the_baseline() -> None:
    broken = member(2, None, outcome="infra_error", error_class="SandboxUnavailable")
    batch = pack_group([member(0, 1.0), member(1, 0.0), broken], "a.0", {}, RULES)
    assert [m.fate for m in batch.members] == ["packed", "packed", "failed"]
    assert batch.members[2].reason == "SandboxUnavailable"
    assert np.allclose(sorted(assemble([batch], "a.0", {}, 1).batch.advantage), [-0.5, 0.5])


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([member(0, 1.0), member(1, 1.0)], [("filtered", "equal_rewards")] * 2),
        ([member(0, 1.0), member(1, 0.0, outcome="cancelled")], [("filtered", "alone"), ("cancelled", "")]),
        (
            [(member(0, 1.0)[0], None), member(1, 0.0), member(2, 1.0)],
            [("failed", "no reward"), ("packed", ""), ("packed", "")],
        ),
        (
            [(member(0, 1.0)[0], UNGRADED), member(1, 0.0), member(2, 1.0)],
            [("failed", "SandboxUnavailable"), ("packed", ""), ("packed", "")],
        ),
        (
            [member(number, number % 2, version=v) for number, v in enumerate(("a.7", "b.9", "a.9", "a.8"))],
            [*(("stale", f"sampled by {v}, head is a.9") for v in ("a.7", "b.9")), ("packed", ""), ("packed", "")],
        ),
    ],
)  # fmt: skip
def test_every_member_has_one_fate(members: list, expected: list[tuple[str, str]]) -> None:
    head = "a.9" if len(members) == 4 else "a.0"
    assert fates(*members, head=head) == expected


def test_turns_that_cannot_be_trained_are_filtered_with_the_reason() -> None:
    asked = request(sample=2, size=3)
    long = trajectory(asked, turn(asked, list(range(1, 40)), [4]))
    empty = trajectory(request(sample=3, size=3))
    bad = trajectory(asked, turn(asked, [1], []))
    cases = {
        "too_long": (long, reward(asked, 1.0)),
        "no_turns": (empty, reward(asked, 0.0)),
        "bad_turn": (bad, reward(asked, 0.0)),
    }
    for reason, case in cases.items():
        assert fates(member(0, 1.0), member(1, 0.0), case)[2] == ("filtered", reason)


def test_a_group_whose_turns_contradict_each_other_closes_with_the_reason() -> None:
    """As if two models had sampled it: their experts differ in number."""
    group = []
    for sample, width in enumerate((1, 2)):
        asked = request(sample=sample)
        said = turn(asked, [1, 2, 3], [10 + sample, 4], routed_experts=bytes(2 * 4 * width))
        group.append((trajectory(asked, said), reward(asked, float(sample))))
    assert fates(*group) == [("filtered", "bad_group")] * 2


def test_a_group_whose_packed_members_are_not_in_its_rows_is_refused() -> None:
    good = pack_group([member(0, 1.0, size=2), member(1, 0.0, size=2)], "a.0", {}, RULES)
    check_group(good)
    (row,), (first, second) = good.rows, good.members
    with pytest.raises(BatchError, match="a member has no rollout_id"):
        check_group(replace(good, members=(replace(first, rollout_id=""), second)))
    with pytest.raises(BatchError, match=f"{first.rollout_id} is packed, but has no weight in any row"):
        check_group(replace(good, rows=(replace(row, weight=pack_floats([0.0, 1.0])),)))


def test_a_rollout_that_grew_old_in_the_queue_has_no_weight() -> None:
    batch = pack_group([member(0, 1.0, version="a.0"), member(1, 0.0, version="a.1")], "a.1", {}, RULES)
    step = assemble([batch], "a.2", {}, 1)
    assert step.stale == ("r-t000000-0",)
    assert step.trained == ("r-t000000-1",)
    assert {int(r): float(w) for r, w in zip(step.batch.rollout, step.batch.weight, strict=True)} == {0: 0.0, 1: 1.0}


def test_a_token_of_a_branch_that_is_left_behind_after_packing_is_stale_at_the_step() -> None:
    asked = request(sample=0)
    mixed = turn(asked, [1, 2, 3], [10, 4])
    mixed = replace(mixed, spans=(VersionSpan("a.6", 0, 1), VersionSpan("a.7", 1, 2)))
    group = [(trajectory(asked, mixed), reward(asked, 1.0)), member(1, 0.0, version="a.6")]
    batch = pack_group(group, "a.7", {}, RULES)
    assert [m.oldest_version for m in batch.members] == ["a.6", "a.6"]
    step = assemble([batch], "b.6", {"b": ("a", 6)}, 1)
    assert (step.trained, step.stale) == (("r-t000000-1",), ("r-t000000-0",))


def test_equal_rewards_are_kept_where_the_loss_learns_from_a_teacher() -> None:
    """Also a member that is alone in its group; one that no teacher knows is filtered as before."""
    rules = replace_rules(RULES, scores=ScoreRules(teacher=True), distils=True)
    for members in ([member(0, 1.0), member(1, 1.0)], [member(0, 1.0, size=1)]):
        rollout = members[0][0].rollout_id
        score = Score(
            run="r", group_id="r-t000000", rollout_id=rollout, scorer="t", version="", turn_ids=(f"{rollout}x",),
            repeats=1, logprobs=pack_floats([-1.0, -2.0]), kind="teacher",
        )  # fmt: skip
        batch = pack_group(members, "a.0", {}, rules, {rollout: [score]})
        assert [m.fate for m in batch.members] == ["packed", "filtered"][: len(members)]
        step = assemble([batch], "a.0", {}, 1)
        assert step.batch.advantage.tolist() == [0.0]
        assert step.trained == (rollout,)
        without = pack_group(members, "a.0", {}, replace_rules(rules, distils=False), {rollout: [score]})
        assert "packed" not in {m.fate for m in without.members}
