"""Two ranks that hold a share of the model each (FSDP2) make the step that one whole model makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from torch.distributed.tensor import DTensor

from kat_stream.errors import ServiceDied, StepCancelled
from kat_stream.rl.settings import RatioConfig
from kat_stream.training.learner import LearnerConfig, TorchLearner
from kat_stream.training.parallel import ParallelLearner, open_learner
from kat_stream.trees import TrainBatch

Build = Callable[..., Any]
CONFIG = LearnerConfig(
    ratio=RatioConfig(mask="none", denominator="train"),
    learning_rate=1e-2, warmup_steps=1, updates=2, micro_batch_tokens=60, dtype="float64",
)  # fmt: skip


@pytest.fixture(scope="module")
def ranks(model_dir: Path) -> Iterator[ParallelLearner]:
    learner = open_learner(model_dir, CONFIG, ranks=2, threads=1, step_s=120.0, sharding="full")
    assert isinstance(learner, ParallelLearner)
    yield learner
    learner.close()


def steps(grow: Build, batch_of: Build) -> list[TrainBatch]:
    """Many trees, one turn (a rank has nothing to run), and a tree larger than the budget, which runs in parts."""
    rng = np.random.default_rng(11)
    return [batch_of(grow(rng, count), rng) for count in (12, 1, 60)]


def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    assert one["model"].keys() == other["model"].keys()
    return max(float((one["model"][name] - other["model"][name]).abs().max()) for name in one["model"])


def test_shares_make_the_steps_of_the_whole_and_resume(
    ranks: ParallelLearner, model_dir: Path, grow: Build, batch_of: Build, tmp_path: Path
) -> None:
    alone = TorchLearner(model_dir, CONFIG)
    start = deepcopy(alone.state_dict())
    batches = steps(grow, batch_of)
    sizes = [max(len(row) for row in batch.rows) for batch in batches]
    assert sizes[2] > CONFIG.micro_batch_tokens >= sizes[0]
    for batch in batches:
        mine, theirs = alone.step(batch).as_dict(), ranks.step(batch).as_dict()
        for name in ("loss", "grad_norm", "mean_ratio", "clip_fraction", "units"):
            assert theirs[name] == pytest.approx(mine[name], rel=1e-9, abs=1e-12), name
    assert all(isinstance(parameter, DTensor) for parameter in ranks.model.parameters())
    assert all(parameter.to_local().numel() < parameter.numel() for parameter in ranks.model.parameters())
    saved = ranks.state_dict()
    assert difference(saved, alone.state_dict()) < 1e-10
    assert difference(saved, start) > 1e-3
    np.testing.assert_allclose(ranks.logprobs(batches[0]), alone.logprobs(batches[0]), atol=1e-9)
    ranks.publish(tmp_path / "weights")
    published = TorchLearner(tmp_path / "weights", replace(CONFIG, updates=1))
    assert difference(published.state_dict(), saved) == 0
    with safe_open(tmp_path / "weights/model.safetensors", "pt") as file:
        assert set(file.keys()) == saved["model"].keys() - {"lm_head.weight"}  # tied
    with pytest.raises(StepCancelled, match="nothing was changed"):
        ranks.step(batches[0], lambda: True)
    first = ranks.step(batches[0])
    ranks.load(saved)
    again = ranks.step(batches[0])
    assert (first.loss, first.grad_norm) == (again.loss, again.grad_norm)


def test_a_rank_that_is_gone_ends_the_step(
    ranks: ParallelLearner, grow: Build, batch_of: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had got the command and went before the first collective. Last in this file: the learner cannot go on."""
    monkeypatch.setattr(ranks.others, "tell", lambda *_: None)
    ranks.others.children[0].kill()
    ranks.others.children[0].join(30)
    with pytest.raises(ServiceDied, match="a rank of the learner is gone"):
        ranks.step(steps(grow, batch_of)[0])
