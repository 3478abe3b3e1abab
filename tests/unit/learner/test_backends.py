"""Back ends for accelerators, as far as a CPU can say: same log-probs, same keys for each run, clear refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from kat_stream.errors import ConfigError
from kat_stream.training.attention import make_plan
from kat_stream.training.cost import CostModel, measured
from kat_stream.training.learner import LearnerConfig, TorchLearner
from kat_stream.training.varlen import varlen_plan
from kat_stream.trees import build_forest, concat, partition, with_path

Build = Callable[..., Any]
CPU = torch.device("cpu")


def batch(grow: Build, batch_of: Build, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return batch_of(grow(rng, 20), rng)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("budget", [4096, 8])
def test_flex_gives_the_same_log_probs_in_parts_and_whole(
    model_dir: Path, grow: Build, batch_of: Build, budget: int
) -> None:
    made = batch(grow, batch_of, 0)
    dense = TorchLearner(model_dir, LearnerConfig(attention="dense")).logprobs(made)
    flex = TorchLearner(model_dir, LearnerConfig(attention="flex", micro_batch_tokens=budget)).logprobs(made)
    assert abs(flex - dense).max() < 2e-5


def test_what_a_cpu_cannot_train_with_is_refused(model_dir: Path, grow: Build, batch_of: Build) -> None:
    made = batch(grow, batch_of, 1)
    with pytest.raises(ConfigError, match="no backward on the CPU"):
        TorchLearner(model_dir, LearnerConfig(attention="flex")).step(made)
    with pytest.raises(ConfigError, match="extra `flash`"):
        TorchLearner(model_dir, LearnerConfig(attention="flash")).step(made)


@pytest.mark.parametrize("budget", [10_000, 7])
def test_varlen_runs_and_gathered_keys_are_the_tree(grow: Build, budget: int) -> None:
    """What flash-attn is asked for, done run by run: causal from the bottom right over the gathered path."""
    row = concat(build_forest(grow(np.random.default_rng(2), 20)))
    for part in partition(row, budget):
        below, above = with_path(row, part)
        generator = torch.Generator().manual_seed(part.start)
        q, k, v = (torch.randn(len(below), 2, 4, generator=generator, dtype=torch.float64) for _ in range(3))
        plan = varlen_plan(below, above, CPU)
        found = []
        for r in range(len(plan.query_cuts) - 1):
            run = slice(plan.query_cuts[r] + above, plan.query_cuts[r + 1] + above)
            path = plan.key[plan.key_cuts[r] : plan.key_cuts[r + 1]]
            queries, keys = run.stop - run.start, len(path)
            mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
            args = (x.transpose(0, 1) for x in (q[run], k[path], v[path]))
            found.append(scaled_dot_product_attention(*args, attn_mask=mask).transpose(0, 1))
        mask = make_plan(below, "dense", above=above).mask[0]  # type: ignore[union-attr]
        args = (x.transpose(0, 1) for x in (q[above:], k, v))
        expected = scaled_dot_product_attention(*args, attn_mask=mask).transpose(0, 1)
        assert (torch.cat(found) - expected).abs().max() < 1e-12
        assert plan.longest_query == int(plan.query_cuts.diff().max())
        assert plan.longest_key == int(plan.key_cuts.diff().max())


def test_the_cost_model_prefers_what_it_predicts_to_be_cheaper(turn: Build) -> None:
    free_calls = CostModel(0.0, 1e-9, 0.0, "cpu")
    dear_calls = CostModel(1.0, 1e-9, 0.0, "cpu")
    turns = [turn(str(k), [1, 2], [*range(k, k + 100 * k)]) for k in range(3, 9)]
    (tree,) = build_forest(turns)
    assert free_calls.choose(tree, 0) == "segments"
    assert dear_calls.choose(tree, 0) == "dense"
    assert free_calls.seconds(tree, 0, "dense") == pytest.approx(1e-9 * len(tree) ** 2)


def test_coefficients_are_measured_and_can_be_read() -> None:
    model = measured(CPU)
    assert min(model.call_s, model.pair_s, model.key_s) > 0
    assert "us a call" in str(model)


def test_auto_changes_no_number(model_dir: Path, grow: Build, batch_of: Build) -> None:
    made = batch(grow, batch_of, 3)
    auto, dense = (TorchLearner(model_dir, LearnerConfig(attention=name)) for name in ("auto", "dense"))  # type: ignore[arg-type]
    assert abs(auto.logprobs(made) - dense.logprobs(made)).max() < 1e-5
