"""Two ranks of the Megatron learner make the step of one, however they divide the model. One spawn for all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kat_stream.errors import BatchError, ServiceDied, StepCancelled
from kat_stream.rl.settings import PenaltyConfig, RatioConfig
from kat_stream.training.learner import LearnerConfig, TorchLearner
from kat_stream.training.megatron.ranks import MegatronLeader, Order, World
from kat_stream.trees import TrainBatch
from tests.unit.learner.megatron_models import in_files

pytestmark = pytest.mark.timeout(900)  # the other rank imports torch and Megatron first
Build = Callable[..., Any]
CONFIG = LearnerConfig(ratio=RatioConfig(mask="none"), learning_rate=1e-3, warmup_steps=1)
TENSOR, EXPERT, DATA = (2, 1), (1, 2), (1, 1)
PARTS = 25
"""Unique tokens of a micro-batch, so that trees run in parts."""


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    opened = World(2, threads=1, step_s=600.0)
    yield opened
    opened.close()


@contextmanager
def divided(
    world: World, directory: Path, shares: tuple[int, int], config: LearnerConfig = CONFIG
) -> Iterator[MegatronLeader]:
    learner = MegatronLeader(world, Order(directory, config, *shares, world.wait_s))
    yield learner
    learner.part()


@pytest.fixture
def batches(grow: Build, batch_of: Build) -> list[TrainBatch]:
    """The second has one turn: in a round of two trees one rank has none."""
    rng = np.random.default_rng(11)
    return [batch_of(grow(rng, count), rng) for count in (24, 1, 15)]


@pytest.mark.parametrize(
    ("name", "shares", "micro"),
    [
        ("tied", TENSOR, 4096),
        ("untied", TENSOR, PARTS),
        ("biased", TENSOR, 4096),
        ("tied", DATA, PARTS),
        ("moe", EXPERT, 4096),
        ("moe-raw", EXPERT, PARTS),
        ("moe", DATA, 4096),
    ],
)
def test_two_ranks_are_one(
    name: str, shares: tuple[int, int], micro: int, world: World, models: Path, batches: list[TrainBatch],
    float64_norms: Build,
) -> None:  # fmt: skip
    """A vocabulary of 7 does not divide by 2; the KL term makes a second model take part in every round."""
    exact = not name.startswith("moe")
    twice = micro == PARTS
    config = replace(
        CONFIG,
        ratio=RatioConfig(mask="none", denominator="train" if twice else "rollout"),
        updates=2 if twice else 1,
        micro_batch_tokens=micro,
        dtype="float64" if exact else "float32",
        penalty=PenaltyConfig(kl_coefficient=0.1),
    )
    alone = TorchLearner(models / name, config)
    if exact:
        float64_norms(alone.model)
        float64_norms(alone._reference)
    bound = 1e-10 if exact else 2e-5
    with divided(world, models / name, shares, config) as ranks:
        start = ranks.state_dict()["model"]
        for batch in batches:
            mine, theirs = alone.step(batch).as_dict(), ranks.step(batch).as_dict()
            for key in mine.keys() - {"seconds", "tokens_per_second", "peak_tokens"}:
                assert theirs[key] == pytest.approx(mine[key], rel=bound, abs=bound), key
        found = ranks.state_dict()["model"]
        expected = in_files(alone.model.named_parameters())
        assert found.keys() == expected.keys()
        assert max(float((found[key] - value).detach().abs().max()) for key, value in expected.items()) < 5 * bound
        assert all(float((found[key] - start[key]).abs().max()) > 10 * bound for key in found), "each has moved"
        difference = ranks.logprobs(batches[0]) - alone.logprobs(batches[0])
        assert abs(difference).max() < 10 * bound


@pytest.mark.parametrize(("name", "shares"), [("tied", TENSOR), ("moe", EXPERT)])
def test_a_checkpoint_resumes_to_the_bit_and_with_any_division(
    name: str, shares: tuple[int, int], world: World, models: Path, batches: list[TrainBatch]
) -> None:
    with divided(world, models / name, shares) as ranks:
        ranks.step(batches[0])
        ranks.step(batches[1])
        state = ranks.state_dict()
        ahead, weights = ranks.step(batches[2]), ranks.state_dict()["model"]
    with divided(world, models / name, shares) as ranks:
        ranks.load(state)
        again = ranks.step(batches[2])
        assert (again.step, again.loss, again.grad_norm) == (3, ahead.loss, ahead.grad_norm)
        found = ranks.state_dict()["model"]
        assert all(torch.equal(found[key], weights[key]) for key in weights)
    with divided(world, models / name, DATA) as ranks:
        ranks.load(state)
        assert ranks.step(batches[2]).loss == pytest.approx(ahead.loss, abs=1e-5)
        found = ranks.state_dict()["model"]
        assert max(float((found[key] - weights[key]).abs().max()) for key in weights) < 1e-4


def test_a_batch_that_teaches_nothing_ends_no_rank(world: World, models: Path, batches: list[TrainBatch]) -> None:
    with divided(world, models / "tied", DATA) as ranks:
        with pytest.raises(BatchError, match="nothing to learn from"):
            ranks.step(replace(batches[0], weight=np.zeros_like(batches[0].weight)))
        assert ranks.step(batches[0]).step == 1


def test_a_step_that_is_stopped_changes_no_rank(world: World, models: Path, batches: list[TrainBatch]) -> None:
    with divided(world, models / "tied", TENSOR) as ranks:
        before = ranks.state_dict()["model"]
        with pytest.raises(StepCancelled, match="nothing was changed"):
            ranks.step(batches[0], lambda: True)
        after = ranks.state_dict()["model"]
        assert all(torch.equal(after[key], before[key]) for key in before)
        ranks.skip_step()
        assert ranks.step(batches[0]).step == 2


def test_a_rank_that_is_gone_ends_the_step(world: World, models: Path, batches: list[TrainBatch]) -> None:
    """Last in this file: the world cannot go on after it."""
    learner = MegatronLeader(world, Order(models / "tied", CONFIG, *TENSOR, world.wait_s))
    world.children[0].kill()
    world.children[0].join(30)
    with pytest.raises(ServiceDied, match="a rank of the learner is gone"):
        learner.step(batches[0])
