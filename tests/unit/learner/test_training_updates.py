"""Several optimizer updates a step (decoupled denominators), and what each term of a composed loss reports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kat_stream.rl.settings import DistillationConfig, PenaltyConfig, RatioConfig
from kat_stream.training.learner import LearnerConfig, TorchLearner
from kat_stream.training.shares import split
from kat_stream.trees import TrainBatch, merge

Build = Callable[..., Any]
DECOUPLED = LearnerConfig(
    ratio=RatioConfig(mask="none", denominator="train", clip_low=0.5, clip_high=0.5),
    learning_rate=1e-2, warmup_steps=1, dtype="float64", updates=3,
)  # fmt: skip


def batch_of_groups(grow: Build, batch_of: Build) -> TrainBatch:
    rng = np.random.default_rng(4)
    return merge([batch_of(grow(rng, 6), rng) for _ in range(3)])


def gap(one: TorchLearner, other: TorchLearner) -> float:
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def test_updates_divide_by_the_log_probs_from_before_the_first(model_dir: Path, grow: Build, batch_of: Build) -> None:
    """By hand: one update after the other, each against log-probs written into the batch before the first."""
    batch = batch_of_groups(grow, batch_of)
    learner, start = (TorchLearner(model_dir, DECOUPLED) for _ in range(2))
    parts = split(batch, learner._objective.units(batch), 3)
    assert len(parts) == 3 and sum(len(part.rows) for part in parts) == len(batch.rows)
    assert sorted(np.concatenate([part.logprobs for part in parts])) == sorted(batch.logprobs)
    before = [start.logprobs(part).astype(np.float32) for part in parts]
    metrics = learner.step(batch)
    one = replace(DECOUPLED, updates=1, ratio=replace(DECOUPLED.ratio, denominator="rollout"))
    by_hand, naive = TorchLearner(model_dir, one), TorchLearner(model_dir, replace(DECOUPLED, updates=1))
    losses = []
    for part, logprobs in zip(parts, before, strict=True):
        losses.append(by_hand.step(replace(part, logprobs=logprobs)).loss)
        naive.step(part)
    assert gap(learner, by_hand) < 1e-6
    assert metrics.loss == pytest.approx(np.mean(losses), abs=1e-6)
    assert (learner.step_count, metrics.step) == (1, 1)
    assert gap(naive, by_hand) > 1e-5, "the comparison must see a denominator that follows the weights"
    assert gap(start, by_hand) > 1e-3


def test_a_stop_is_heeded_until_the_first_update(model_dir: Path, grow: Build, batch_of: Build) -> None:
    batch = batch_of_groups(grow, batch_of)
    learner, whole = TorchLearner(model_dir, DECOUPLED), TorchLearner(model_dir, DECOUPLED)
    start = [parameter.detach().clone() for parameter in learner.model.parameters()]

    def moved() -> bool:
        return any(not a.equal(b) for a, b in zip(start, learner.model.parameters(), strict=True))

    learner.step(batch, moved)
    whole.step(batch)
    assert gap(learner, whole) == 0


def test_every_term_reports_its_share_and_its_tokens(model_dir: Path, grow: Build, batch_of: Build) -> None:
    rng = np.random.default_rng(6)
    batch = batch_of(grow(rng, 12), rng)
    teacher = (batch.logprobs - 1.0).astype(np.float32)
    teacher[::3] = np.nan
    config = LearnerConfig(
        ratio=RatioConfig(mask="icepop", mask_low=0.9, mask_high=1.2),
        distillation=DistillationConfig(coefficient=0.5, clip=0.5),
        penalty=PenaltyConfig(kl_coefficient=0.1, entropy_coefficient=0.01),
        dtype="float64", micro_batch_tokens=24,
    )  # fmt: skip
    learner = TorchLearner(model_dir, config)
    policy = learner.logprobs(batch)
    found = learner.step(replace(batch, teacher_logprobs=teacher)).as_dict()
    terms = [found[f"loss_{name}"] for name in ("policy", "distillation", "kl", "entropy")]
    assert sum(terms) == pytest.approx(found["loss"], abs=1e-12)
    assert found["loss_kl"] == pytest.approx(0, abs=1e-12)
    known = ~np.isnan(teacher)
    k = np.exp(policy - batch.logprobs)
    expected = {
        "known": known,
        "clipped": known & (np.abs(np.where(known, teacher, 0) - policy) > 0.5),
        "masked": known & ~((k >= 0.9) & (k <= 1.2)),
    }
    for name, tokens in expected.items():
        assert 0 < tokens.mean() < 1
        assert found[f"distillation_{name}_fraction"] == pytest.approx(tokens.mean()), name
    plain = TorchLearner(model_dir, LearnerConfig()).step(batch).as_dict()
    assert not [name for name in plain if name.startswith(("loss_", "distillation", "routing"))]
