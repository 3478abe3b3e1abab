"""A tree larger than the budget runs in parts with gateways, and nothing tells the difference but the memory (T3).

Two negative controls (no log-prob gateway, no gateway for keys and values) show that the comparison would notice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kat_stream.errors import BatchError
from kat_stream.rl.settings import PenaltyConfig, RatioConfig
from kat_stream.training import gateways
from kat_stream.training.gateways import Gateways
from kat_stream.training.learner import LearnerConfig, TorchLearner
from kat_stream.training.rows import make_micro_batch
from kat_stream.trees import (
    TrainBatch,
    TurnTokens,
    build_forest,
    check_layout,
    concat,
    make_batch,
    partition,
    with_path,
)

Build = Callable[..., Any]
EXACT = 1e-12
WHOLE = 100_000


def gradients(learner: TorchLearner, batch: TrainBatch) -> tuple[dict[str, Tensor], Any]:
    """Gradients of one step, before they are clipped or applied, and its metrics."""
    found: dict[str, Tensor] = {}

    def keep(*_: object) -> None:
        found.update({name: p.grad.clone() for name, p in learner.model.named_parameters() if p.grad is not None})

    hook = learner.optimizer.register_step_pre_hook(keep)
    metrics = learner.step(batch)
    hook.remove()
    return found, metrics


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference over all parameters, relative to the largest gradient."""
    assert a.keys() == b.keys()
    largest = max(float(value.abs().max()) for value in b.values())
    return max(float((a[name] - b[name]).abs().max()) for name in b) / largest


def one_row(turns: Sequence[TurnTokens], rng: np.random.Generator) -> TrainBatch:
    owner = np.sort(rng.integers(0, 3, len(turns)))
    return make_batch(
        turns,
        rollout=owner,
        advantage=rng.standard_normal(3)[owner],
        weight=rng.uniform(0.2, 1, len(turns)),
        rollout_ids=["a", "b", "c"],
        budget_tokens=WHOLE,
    )


@pytest.fixture
def learner(model_dir: Path, float64_norms: Build) -> Callable[..., TorchLearner]:
    """Exact in float64: float64 norms, and a gradient norm that is never clipped."""

    def make(budget: int, dtype: str = "float64", **fields: Any) -> TorchLearner:
        fields.setdefault("ratio", RatioConfig(mask="none", clip_low=0.5, clip_high=1.0))
        config = LearnerConfig(dtype=dtype, micro_batch_tokens=budget, grad_clip=1e9, **fields)  # type: ignore[arg-type]
        made = TorchLearner(model_dir, config)
        if dtype == "float64":
            float64_norms(made.model)
        return made

    return make


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6), st.integers(1, 20), st.integers(1, 60))
def test_parts_cover_the_row_once_and_open_parts_are_a_path(grow: Build, seed: int, count: int, budget: int) -> None:
    row = concat(build_forest(grow(np.random.default_rng(seed), count)))
    parts = partition(row, budget)
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    assert parts[-1].stop == len(row)
    opened: list[Any] = []
    for part in parts:
        opened = [above for above in opened if above.close > part.start]
        below, above = with_path(row, part)
        check_layout(below)
        assert 0 < len(part) <= budget
        assert above == sum(map(len, opened)) == row.pos[part.start]
        assert above + len(part) <= row.depth + budget
        inside = row.parent[part.start : part.stop]
        outside = inside[inside < part.start]
        assert set(outside.tolist()) == {opened[-1].stop - 1 if opened else -1}
        opened.append(part)


def test_a_row_within_the_budget_is_one_part(grow: Build) -> None:
    row = concat(build_forest(grow(np.random.default_rng(0), 12)))
    assert len(partition(row, len(row))) == 1
    with pytest.raises(BatchError, match="budget of 0 tokens"):
        partition(row, 0)


@pytest.mark.parametrize("backend", ["segments", "dense"])
@pytest.mark.parametrize(("seed", "budget"), [(0, 1), (1, 3), (2, 9), (3, 30), (4, 60)])
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_gradients_equal_the_whole_tree(
    learner: Build, grow: Build, backend: str, seed: int, budget: int, p: float
) -> None:
    rng = np.random.default_rng(seed)
    batch = one_row(grow(rng, 24), rng)
    ratio = RatioConfig(mask="none", clip_low=0.5, clip_high=1.0, length_exponent=p)
    penalty = PenaltyConfig(kl_coefficient=0.1, entropy_coefficient=0.02)
    made = [learner(b, attention=backend, ratio=ratio, penalty=penalty) for b in (WHOLE, budget)]
    (whole, expected), (parts, found) = (gradients(m, batch) for m in made)
    assert distance(parts, whole) < EXACT
    assert found.loss == pytest.approx(expected.loss, abs=EXACT)
    assert (found.clip_fraction, found.units) == (expected.clip_fraction, expected.units)
    assert found.peak_tokens <= max(row.depth for row in batch.rows) + budget
    assert found.peak_tokens < expected.peak_tokens == batch.tree_tokens


@pytest.mark.parametrize("budget", [1, 5, 20])
def test_a_sequence_over_branches_is_exact_too(learner: Build, grow: Build, budget: int) -> None:
    rng = np.random.default_rng(5)
    batch = one_row(grow(rng, 20), rng)
    ratio = RatioConfig(level="sequence", length_exponent=1.0, mask="none", clip_low=0.9, clip_high=9.0)
    penalty = PenaltyConfig(entropy_coefficient=0.02)
    whole, _ = gradients(learner(WHOLE, ratio=ratio, penalty=penalty), batch)
    parts, metrics = gradients(learner(budget, ratio=ratio, penalty=penalty), batch)
    assert distance(parts, whole) < EXACT
    assert metrics.units == 3


def test_float32_on_an_unchanged_model_is_within_its_rounding(learner: Build, grow: Build) -> None:
    rng = np.random.default_rng(6)
    batch = one_row(grow(rng, 24), rng)
    whole, _ = gradients(learner(WHOLE, "float32"), batch)
    parts, _ = gradients(learner(12, "float32"), batch)
    assert distance(parts, whole) < 1e-5


def test_no_token_runs_twice(learner: Build, grow: Build) -> None:
    """Rows that reach the first projection of keys, over all parts: the unique tokens and no more."""
    rng = np.random.default_rng(7)
    batch = one_row(grow(rng, 24), rng)
    made = learner(4)
    rows = {"keys": 0, "vocabulary": 0}

    def count(name: str) -> Callable[..., None]:
        return lambda module, args, output: rows.__setitem__(name, rows[name] + output.shape[1])

    made.model.model.layers[0].self_attn.k_proj.register_forward_hook(count("keys"))
    made.model.lm_head.register_forward_hook(count("vocabulary"))
    made.step(batch)
    (row,) = batch.rows
    assert rows["keys"] == batch.tree_tokens
    assert rows["vocabulary"] == len(np.unique(row.parent[np.unique(row.index)]))


def test_log_probs_of_a_large_tree_are_the_same(learner: Build, grow: Build) -> None:
    rng = np.random.default_rng(8)
    batch = one_row(grow(rng, 24), rng)
    assert abs(learner(3).logprobs(batch) - learner(WHOLE).logprobs(batch)).max() < EXACT


@pytest.mark.parametrize("control", ["values", "keys"])
def test_without_a_gateway_gradients_are_wrong(
    learner: Build, grow: Build, control: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: what crosses a cut is needed, the log-probs of a crossing turn as much as keys and values."""
    rng = np.random.default_rng(9)
    batch = one_row(grow(rng, 24), rng)
    whole, _ = gradients(learner(WHOLE), batch)
    if control == "values":
        monkeypatch.setattr(Gateways, "values", lambda self: [part.values.detach() for part in self._open])
    else:
        monkeypatch.setattr(gateways, "_leaves", lambda pair, graph: tuple(t.detach() for t in pair))
    parts, _ = gradients(learner(6), batch)
    assert distance(parts, whole) > 1e-2


def test_turns_cross_cuts(grow: Build) -> None:
    """The trees above do contain what they are to test."""
    rng = np.random.default_rng(9)
    batch = one_row(grow(rng, 24), rng)
    micro = make_micro_batch(batch, [0], 6)
    part = micro.part[micro.edge]
    (row,) = batch.rows
    cuts = np.cumsum(row.lengths)
    crossing = sum(len(set(turn.tolist())) > 1 for turn in np.split(part, cuts[:-1]))
    assert crossing >= 5


def test_partition_changes_nothing_of_a_batch(learner: Build, grow: Build) -> None:
    """Rows of a batch and one concatenated row train alike, whatever the budget."""
    rng = np.random.default_rng(10)
    batch = one_row(grow(rng, 24), rng)
    once, _ = gradients(learner(20), batch)
    again, _ = gradients(learner(20), replace(batch, rows=(concat(batch.rows),)))
    assert distance(again, once) < EXACT
