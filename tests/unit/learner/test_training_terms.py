"""Distillation, KL and entropy on a tree give what separate paths give: a turn's tokens count for that turn (O6)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kat_stream.errors import BatchError
from kat_stream.rl.settings import DistillationConfig, PenaltyConfig, RatioConfig
from kat_stream.training.learner import LearnerConfig, TorchLearner
from kat_stream.trees import TurnTokens, make_batch, merge

Build = Callable[..., Any]
TERMS = {
    "distillation": DistillationConfig(coefficient=0.8, clip=1.0),
    "penalty": PenaltyConfig(kl_coefficient=0.3, entropy_coefficient=0.05),
}


def path_terms(model: torch.nn.Module, turns: Sequence[TurnTokens], teacher: Sequence[np.ndarray]) -> Tensor:
    """The three terms, turn by turn on its own path; every turn weighs the same. The reference is the model itself."""
    total = torch.zeros((), dtype=torch.float64)
    for one, signal in zip(turns, teacher, strict=True):
        path = torch.from_numpy(np.concatenate([one.prompt_ids, one.sampled_ids]).astype(np.int64))
        log_softmax = model(input_ids=path[None]).logits[0].log_softmax(-1)
        at = torch.arange(len(one.prompt_ids), len(path))
        logp = log_softmax[at - 1, path[at]]
        gap = torch.from_numpy(signal.astype(np.float64)) - logp.detach()
        distilled = -(gap.nan_to_num(0.0).clamp(-1, 1) * logp)
        spread = -(log_softmax[at - 1].exp() * log_softmax[at - 1]).sum(-1)
        reference = logp.detach() - logp
        kl = reference.exp() - 1 - reference
        total = total + (0.8 * distilled + 0.3 * kl - 0.05 * spread).mean() / len(turns)
    return total


@pytest.mark.parametrize("budget", [4096, 7])
def test_terms_on_a_tree_equal_separate_paths(
    model_dir: Path, plain_model: torch.nn.Module, grow: Build, float64_norms: Build, budget: int
) -> None:
    rng = np.random.default_rng(0)
    turns = grow(rng, 20)
    teacher = [-rng.uniform(0.2, 3, len(t.sampled_ids)).astype(np.float32) for t in turns]
    teacher[3][:] = np.nan
    by_logprobs = {t.logprobs.tobytes(): signal for t, signal in zip(turns, teacher, strict=True)}
    count = len(turns)
    batch = make_batch(
        turns, rollout=np.arange(count), advantage=np.zeros(count), weight=np.ones(count),
        rollout_ids=[t.turn_id for t in turns], budget_tokens=10_000,
    )  # fmt: skip
    split = np.split(batch.logprobs, np.cumsum(batch.lengths)[:-1])
    batch = replace(batch, teacher_logprobs=np.concatenate([by_logprobs[part.tobytes()] for part in split]))

    config = LearnerConfig(
        dtype="float64", micro_batch_tokens=budget, grad_clip=1e9, ratio=RatioConfig(mask="none"), **TERMS
    )  # type: ignore[arg-type]
    learner = TorchLearner(model_dir, config)
    for model in (learner.model, learner._reference):
        float64_norms(model)
    found: dict[str, Tensor] = {}
    learner.optimizer.register_step_pre_hook(
        lambda *_: found.update({name: p.grad.clone() for name, p in learner.model.named_parameters()})
    )
    metrics = learner.step(batch)
    loss = path_terms(plain_model, turns, teacher)
    torch.autograd.backward(loss)
    assert metrics.loss == pytest.approx(loss.item(), abs=1e-12)
    for name, value in plain_model.named_parameters():
        assert value.grad is not None
        assert (found[name] - value.grad).abs().max() < 1e-12, name


def test_a_batch_without_a_teacher_is_refused_and_merged_ones_have_none_for_those_turns(
    model_dir: Path, turn: Build
) -> None:
    def one(prompt: list[int]) -> Any:
        turns = [turn("t", prompt, [1, 2])]
        return make_batch(turns, rollout=[0], advantage=[1.0], weight=[1.0], rollout_ids=["r"], budget_tokens=9)

    with pytest.raises(BatchError, match="no teacher's log-probs"):
        TorchLearner(model_dir, LearnerConfig(distillation=DistillationConfig(coefficient=1.0))).step(one([0]))
    taught = replace(one([1]), teacher_logprobs=np.array([-1, -2], np.float32))
    both = merge([one([0]), taught]).teacher_logprobs
    assert both is not None
    assert np.isnan(both[:2]).all()
    assert both[2:].tolist() == [-1, -2]
    assert merge([one([0])]).teacher_logprobs is None
    with pytest.raises(BatchError, match=r"teacher_logprobs has shape \(1,\) for 2"):
        replace(taught, teacher_logprobs=np.array([-1], np.float32))
    with pytest.raises(BatchError, match="infinite"):
        replace(taught, teacher_logprobs=np.array([-1, -np.inf], np.float32))


def test_a_step_without_the_teacher_that_it_asks_for_is_refused_before_any_tree_runs(
    model_dir: Path, grow: Build, batch_of: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks that are dealt no tree would else wait for the others' gradients, and be a step behind from then on."""
    learner = TorchLearner(model_dir, LearnerConfig(distillation=DistillationConfig(coefficient=1.0)))
    ran: list[object] = []
    monkeypatch.setattr(learner, "_gradients", lambda *given: ran.append(given))
    rng = np.random.default_rng(0)
    with pytest.raises(BatchError, match="no teacher's log-probs"):
        learner.step(batch_of(grow(rng, 5), rng))
    assert not ran
