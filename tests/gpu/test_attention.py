"""Every back end on a GPU gives the log-probs, the loss and the gradients of the dense reference on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kat_stream.training.learner import LearnerConfig, TorchLearner
from tests.unit.learner.test_partition import distance, gradients

pytestmark = pytest.mark.gpu
Build = Callable[..., Any]
DEVICE = "cuda"
FLOAT32, BFLOAT16 = 2e-3, 5e-2
"""Allowed distance: matrix products in another order, and flash-attn's inputs in bfloat16."""
needs_flash = pytest.mark.skipif(find_spec("flash_attn") is None, reason="the extra `flash` is not installed")
BACKENDS = [
    ("dense", FLOAT32),
    ("padded", FLOAT32),
    ("segments", FLOAT32),
    ("auto", FLOAT32),
    ("flex", FLOAT32),
    pytest.param("flash", BFLOAT16, marks=needs_flash),
]


def learner(model_dir: Path, device: str, attention: Any, budget: int) -> TorchLearner:
    """Gradients are not clipped."""
    config = LearnerConfig(attention=attention, micro_batch_tokens=budget, device=device, grad_clip=1e9)
    return TorchLearner(model_dir, config)


@pytest.mark.parametrize("budget", [4096, 8], ids=["whole", "in parts"])
@pytest.mark.parametrize(("attention", "allowed"), BACKENDS)
def test_a_step_is_that_of_the_cpu(
    model_dir: Path, grow: Build, batch_of: Build, attention: str, allowed: float, budget: int
) -> None:
    rng = np.random.default_rng(budget)
    batch = batch_of(grow(rng, 20), rng)
    reference = learner(model_dir, "cpu", "dense", 4096)
    here = learner(model_dir, DEVICE, attention, budget)
    assert abs(here.logprobs(batch) - reference.logprobs(batch)).max() < allowed
    expected, of_reference = gradients(reference, batch)
    found, metrics = gradients(here, batch)
    assert distance({name: value.cpu() for name, value in found.items()}, expected) < allowed
    assert metrics.loss == pytest.approx(of_reference.loss, rel=allowed, abs=allowed)


def test_a_saved_step_goes_on_to_the_same_weights(model_dir: Path, grow: Build, batch_of: Build) -> None:
    rng = np.random.default_rng(3)
    first, second = (batch_of(grow(rng, 20), rng) for _ in range(2))
    one, other = (learner(model_dir, DEVICE, "segments", 4096) for _ in range(2))
    one.step(first)
    other.load(deepcopy(one.state_dict()))
    for each in (one, other):
        each.step(second)
    assert all(torch.allclose(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))
