"""Advantages and staleness."""

from __future__ import annotations

import numpy as np
import pytest

from kat_stream.config import load
from kat_stream.errors import ConfigError, DataError
from kat_stream.rl.advantages import ADVANTAGES, group_mean, group_std, grouped, leave_one_out
from kat_stream.rl.aggregation import turn_weights
from kat_stream.rl.staleness import age, forks_of, is_stale, oldest
from topics.policy_version import PolicyVersion
from topics.turn import VersionSpan

FORKS = {"b": ("a", 5), "c": ("b", 8)}


def test_group_advantages() -> None:
    assert group_mean([1, 0, 0, 1]).tolist() == [0.5, -0.5, -0.5, 0.5]  # type: ignore[union-attr]
    assert group_std([1, 0, 0, 1]).tolist() == [1, -1, -1, 1]  # type: ignore[union-attr]


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
@pytest.mark.parametrize("rewards", [[], [1.0], [0.0, 0.0, 0.0], [0.1, 0.1], [0.1 + 0.2, 0.3], [1e6, 1e6 + 1e-6]])
def test_equal_rewards_teach_nothing(name: str, rewards: list[float]) -> None:
    assert ADVANTAGES[name](rewards) is None
    assert np.isnan(grouped(rewards, ["a"] * len(rewards), ADVANTAGES[name])).all()


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
def test_a_small_difference_of_rewards_is_one(name: str) -> None:
    found = ADVANTAGES[name]([0.3, 0.3 + 1e-6])
    assert found is not None and found[0] < 0 < found[1]


def test_a_reward_that_is_no_number_is_refused() -> None:
    with pytest.raises(DataError, match="reward nan"):
        group_mean([0.0, float("nan")])


def test_every_rollout_weighs_the_same() -> None:
    shares = turn_weights([0, 0, 2, 2, 2, 2, 5], [1] * 7, aggregation="trajectory", level="turn")
    assert shares.tolist() == [0.5, 0.5, 0.25, 0.25, 0.25, 0.25, 1.0]


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("c.10", 0),
        ("c.8", 2),
        ("b.8", 2),
        ("b.6", 4),
        ("a.5", 5),
        ("a.3", 7),
        ("b.9", None),
        ("a.6", None),
        ("z.9", None),
    ],
)
def test_age_follows_the_surviving_branch(version: str, expected: int | None) -> None:
    assert age(version, "c.10", FORKS) == expected


def test_what_an_abandoned_lineage_published_is_stale_under_any_bound() -> None:
    assert is_stale("b.9", "c.10", FORKS, bound=10**9)
    assert is_stale("a.5", "c.10", FORKS, bound=4)
    assert not is_stale("a.5", "c.10", FORKS, bound=5)
    assert not is_stale("c.11", "c.10", FORKS, bound=0)


def test_a_branch_is_left_where_its_first_child_left_it() -> None:
    """a.4 is on c's branch only if b, which c grew from, left a at 4 or later."""
    forks = {"b": ("a", 3), "c": ("b", 8)}
    assert age("a.3", "c.9", forks) == 6
    assert age("a.4", "c.9", forks) is None


def test_forks_come_from_the_published_versions() -> None:
    def publish(lineage: str, number: int, parent: str = "", at: int = -1) -> PolicyVersion:
        return PolicyVersion(
            run="r",
            model="m",
            lineage=lineage,
            number=number,
            path="",
            checksum="",
            parent_lineage=parent,
            parent_number=at,
        )

    assert forks_of([publish("a", 0), publish("b", 5, "a", 5), publish("b", 6, "a", 5)]) == {"b": ("a", 5)}


def test_a_circle_of_lineages_ends() -> None:
    assert age("z.1", "a.2", {"a": ("b", 1), "b": ("a", 1)}) is None


def test_the_oldest_token_counts() -> None:
    spans = [VersionSpan("c.9", 0, 4), VersionSpan("c.10", 4, 9)]
    assert oldest(spans, "c.10", FORKS) == "c.9"
    assert oldest([*spans, VersionSpan("b.9", 9, 10)], "c.10", FORKS) == "b.9"
    assert oldest([*spans, VersionSpan("c.1", 9, 9)], "c.10", FORKS) == "c.9"
    with pytest.raises(ValueError):
        oldest([], "c.10", FORKS)


def test_leaving_oneself_out() -> None:
    assert leave_one_out([1, 0, 0]).tolist() == pytest.approx([1, -0.5, -0.5])  # type: ignore[union-attr]


def test_each_scaffold_has_a_baseline_of_its_own() -> None:
    keys = [("t", "a"), ("t", "b"), ("t", "a"), ("t", "b"), ("t", "c")]
    found = grouped([1, 10, 0, 30, 5], keys, group_mean)
    assert found[:4].tolist() == [0.5, -10, -0.5, 10]
    assert np.isnan(found[4])


@pytest.mark.parametrize(
    ("aggregation", "level", "expected"),
    [
        ("trajectory", "turn", [0.5, 0.5, 1.0]),
        ("global", "turn", [1, 1, 1]),
        ("global", "token", [4, 2, 3]),
        ("global", "sequence", [0.5, 0.5, 1.0]),
    ],
)
def test_weights_before_normalisation(aggregation: str, level: str, expected: list[float]) -> None:
    assert turn_weights([0, 0, 1], [4, 2, 3], aggregation=aggregation, level=level).tolist() == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.mask=icecream", "mask"),
        ("trainer.length_exponent=0.3", r"\[trainer\] length_exponent is 0.3, expected 0, 0.5 or 1"),
        ("trainer.mask_low=2.0", r"\[trainer\] mask_low 2.0 and mask_high 5.0 do not enclose 1"),
        ("trainer.distillation_coefficient=-1.0", r"\[trainer\] distillation: coefficient -1.0"),
        ("trainer.advantage=best", "advantage"),
    ],
)
def test_a_meaningless_trainer_section_is_refused_when_it_is_read(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(None, [override])
