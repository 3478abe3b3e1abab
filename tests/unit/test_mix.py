"""Mixes of scaffolds: deterministic, in proportion, and no member is alone under its scaffold."""

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kat_stream.config import dump, load
from kat_stream.errors import ConfigError
from kat_stream.mix import check_mix, members
from tests.unit.test_curriculum import SCHEDULE, TASKS

MIXES = st.dictionaries(st.sampled_from(["codex", "shell", "aider", "cline"]), st.floats(0.01, 100), min_size=1)


@given(mix=MIXES, size=st.integers(1, 33), seed=st.integers(0, 2**32))
def test_nobody_is_alone_and_the_seed_decides(mix: dict[str, float], size: int, seed: int) -> None:
    names = members(mix, size, random.Random(seed))
    assert names == members(mix, size, random.Random(seed))
    assert len(names) == size
    assert set(names) <= set(mix)
    assert size == 1 or min(Counter(names).values()) >= 2


def test_shares_are_the_weights() -> None:
    assert Counter(members({"codex": 1, "shell": 3}, 8, random.Random(1))) == {"codex": 2, "shell": 6}
    counts = Counter(name for seed in range(4000) for name in members({"codex": 1, "shell": 3}, 2, random.Random(seed)))
    assert 0.23 < counts["codex"] / 8000 < 0.27


def test_a_group_shares_its_task_among_the_scaffolds() -> None:
    schedule = replace(SCHEDULE, group_size=8, mix={"codex": 1, "shell": 3})
    group = schedule.group(3, TASKS, 0.0)
    assert Counter(request.task.scaffold for request in group) == {"codex": 2, "shell": 6}
    assert len({(request.group_id, request.task.task_id) for request in group}) == 1
    assert group == schedule.group(3, TASKS, 0.0)


def test_evaluations_ask_the_same_in_every_round() -> None:
    schedule = replace(SCHEDULE, mix={"codex": 1, "shell": 1})
    first, second = [[r.task.scaffold for r in schedule.evaluation(number, TASKS, 0.0)] for number in (0, 4)]
    assert first == second
    assert set(first) == {"codex", "shell"}


def test_without_a_mix_each_task_names_its_own() -> None:
    assert {request.task.scaffold for request in SCHEDULE.group(0, TASKS, 0.0)} == {"shell"}


def test_a_mix_is_configured_and_kept() -> None:
    config = load(None, ["sampler.scaffold={codex = 1, shell = 3}"])
    assert config.sampler.scaffold == {"codex": 1.0, "shell": 3.0}
    assert 'scaffold = { "codex" = 1.0, "shell" = 3.0 }' in dump(config)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_is_a_number_above_0(weight: float) -> None:
    with pytest.raises(ConfigError, match=r"sampler.scaffold: codex = "):
        check_mix({"codex": weight})
