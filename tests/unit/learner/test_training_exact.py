"""The tree gives exactly what its paths give apart: log-probs, loss, gradients, one AdamW step; in float64, to 1e-12.

Two negative controls (a plain causal mask, positions that are row indices) show that the comparison would notice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV3Config, DiffLlamaConfig

from kat_stream.rl.settings import RatioConfig
from kat_stream.training.attention import Backend, DensePlan
from kat_stream.training.gateways import Gateways
from kat_stream.training.learner import LearnerConfig, TorchLearner
from kat_stream.training.rows import MicroBatch, edge_values, make_micro_batch, part_inputs
from kat_stream.trees import TrainBatch, TurnTokens, build_forest, concat, make_batch

Build = Callable[..., Any]
EXACT = 1e-12
BACKENDS: tuple[Backend, ...] = ("segments", "padded", "dense")


def configure(backend: Backend, micro_batch_tokens: int = 4096, **ratio: Any) -> LearnerConfig:
    return LearnerConfig(
        dtype="float64",
        attention=backend,
        micro_batch_tokens=micro_batch_tokens,
        learning_rate=1e-2,
        warmup_steps=1,
        weight_decay=0.05,
        ratio=RatioConfig(mask_low=0.0, mask_high=math.inf, **ratio),
    )


def path_loss(logp: Sequence[Tensor], turns: Sequence[TurnTokens], batch: TrainBatch, p: float) -> Tensor:
    """Turn ratio with clip 0.2 and dual clip 3, turn by turn; turns are matched to the batch by their log-probs."""
    total = float(batch.weight.sum(dtype=np.float64))
    by_logprobs = {turn.logprobs.tobytes(): k for k, turn in enumerate(turns)}
    cuts = np.cumsum(batch.lengths)
    loss = torch.zeros((), dtype=torch.float64)
    for n, old in enumerate(np.split(batch.logprobs, cuts[:-1])):
        delta = logp[by_logprobs[old.tobytes()]] - torch.from_numpy(old.astype(np.float64))
        ratio = (delta.sum() * len(old) ** -p).exp()
        advantage = float(batch.advantage[n])
        value = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        if advantage < 0:
            value = value.clamp(min=3 * advantage)
        loss = loss - float(batch.weight[n]) / total * value
    return loss


@pytest.fixture
def exact(float64_norms: Build) -> Callable[[Path, LearnerConfig], TorchLearner]:
    """A learner without float32 anywhere."""

    def make(directory: Path, config: LearnerConfig) -> TorchLearner:
        learner = TorchLearner(directory, config)
        float64_norms(learner.model)
        return learner

    return make


WHOLE = 10_000
CPU = torch.device("cpu")


def turn_logprobs(model: torch.nn.Module, micro: MicroBatch, backend: Backend, **wrong: Any) -> Tensor:
    """float[S] with gradient, of a micro-batch in one part; `wrong` replaces inputs."""
    inputs = replace(part_inputs(micro, 0, backend, CPU), **wrong)
    return edge_values(model, inputs, Gateways())[0].index_select(0, torch.from_numpy(micro.edge))


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("seed", "p", "micro"), [(0, 0.0, 4096), (1, 1.0, 30), (2, 0.5, 1)])
def test_loss_gradients_and_one_step_equal_separate_paths(
    exact: Build, backend: Backend, seed: int, p: float, micro: int, model_dir: Path, plain_model: torch.nn.Module,
    grow: Build, batch_of: Build, path_logprobs: Build,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    turns = grow(rng, 24)
    batch = batch_of(turns, rng)
    assert batch.tree_tokens < 0.8 * sum(len(t.prompt_ids) + len(t.sampled_ids) for t in turns)
    learner = exact(model_dir, configure(backend, micro, length_exponent=p))
    metrics = learner.step(batch)

    optimizer = torch.optim.AdamW(plain_model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.05)
    loss = path_loss(path_logprobs(plain_model, turns), turns, batch, p)
    torch.autograd.backward(loss)
    norm = torch.nn.utils.clip_grad_norm_(plain_model.parameters(), 1.0)
    optimizer.step()
    assert metrics.loss == pytest.approx(loss.item(), abs=EXACT)
    assert metrics.grad_norm == pytest.approx(norm.item(), rel=EXACT)
    mine = dict(learner.model.named_parameters())
    # Adam's first step divides a gradient by its own size, so a gradient of 1e-9 amplifies rounding a thousandfold.
    assert max(far(mine[name], value) for name, value in plain_model.named_parameters()) < 1e-11
    assert 0 < metrics.clip_fraction < 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_gradient_equals_separate_paths(
    exact: Build, backend: Backend, model_dir: Path, plain_model: torch.nn.Module, grow: Build, path_logprobs: Build
) -> None:
    rng = np.random.default_rng(7)
    turns = grow(rng, 30)
    trees = build_forest(turns)
    batch = _bare(turns)
    learner = exact(model_dir, configure(backend))
    weights = [torch.from_numpy(rng.standard_normal(len(t.sampled_ids))) for t in turns]
    reference = sum((w * logp).sum() for w, logp in zip(weights, path_logprobs(plain_model, turns), strict=True))
    torch.autograd.backward(reference)

    order = [int(n) for tree in trees for n in tree.turns]
    logp = turn_logprobs(learner.model, make_micro_batch(batch, [0], WHOLE), backend)
    torch.autograd.backward((torch.cat([weights[n] for n in order]) * logp).sum())
    mine = {name: value.grad for name, value in learner.model.named_parameters()}
    for name, value in plain_model.named_parameters():
        assert value.grad is not None
        assert far(mine[name], value.grad) <= EXACT * max(1.0, float(value.grad.abs().max())), name


def _bare(turns: Sequence[TurnTokens]) -> TrainBatch:
    """All trees in one row, every turn alike."""
    ones = np.ones(len(turns))
    return make_batch(turns, rollout=0 * ones, advantage=ones, weight=ones, rollout_ids=["r"], budget_tokens=10_000)


@pytest.mark.parametrize("control", ["causal mask", "row positions"])
def test_the_comparison_has_power(
    exact: Build, control: str, model_dir: Path, plain_model: torch.nn.Module, grow: Build, path_logprobs: Build
) -> None:
    rng = np.random.default_rng(8)
    turns = grow(rng, 20)
    batch = _bare(turns)
    model = exact(model_dir, configure("dense")).model
    micro = make_micro_batch(batch, [0], WHOLE)
    size = len(micro.layout)
    order = [int(n) for n in np.concatenate([tree.turns for tree in build_forest(turns)])]
    expected = torch.cat([path_logprobs(plain_model, turns)[n] for n in order])
    assert far(turn_logprobs(model, micro, "dense"), expected) < EXACT
    causal = DensePlan(torch.ones(size, size, dtype=torch.bool).tril()[None, None])
    wrong = {"plan": causal} if control == "causal mask" else {"pos": torch.arange(size)[None]}
    assert far(turn_logprobs(model, micro, "dense", **wrong), expected) > 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sibling_cannot_be_seen_and_an_ancestor_can(
    exact: Build, backend: Backend, model_dir: Path, turn: Build
) -> None:
    learner = exact(model_dir, configure(backend))

    def logprobs(prompt: list[int], sibling: list[int]) -> np.ndarray:
        batch = _bare([turn("a", [*prompt, 1], [2, 3, 4]), turn("b", [*prompt, 2], sibling)])
        return learner.logprobs(batch)[:3]

    before = logprobs([0, 5], [1, 1, 1])
    assert (logprobs([0, 5], [6, 5, 6]) == before).all()
    assert abs(logprobs([0, 4], [1, 1, 1]) - before).max() > 1e-3


def test_first_tokens_of_branches_are_trained(model_dir: Path, turn: Build) -> None:
    """Each (turn, token) edge once, those at a branching point included."""
    turns = [turn("a", [0, 1], [2, 3]), turn("b", [0, 1], [4]), turn("c", [0, 1], [2, 5])]
    micro = make_micro_batch(_bare(turns), [0], WHOLE)
    assert len(micro.edge) == 5
    assert len(micro.targets) == 4
    assert len(part_inputs(micro, 0, "segments", CPU).source) == 2


def test_both_back_ends_agree_on_another_architecture(
    exact: Build, float64_norms: Build, llama_dir: Path, grow: Build, path_logprobs: Build
) -> None:
    rng = np.random.default_rng(9)
    turns = grow(rng, 25)
    batch = _bare(turns)
    plain = AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.float64, attn_implementation="sdpa")
    float64_norms(plain)
    order = [int(n) for n in np.concatenate([tree.turns for tree in build_forest(turns)])]
    expected = torch.cat([path_logprobs(plain, turns)[n] for n in order]).detach().numpy()
    for backend in BACKENDS:
        found = exact(llama_dir, configure(backend)).logprobs(batch)
        assert abs(found - expected).max() < EXACT


SIZES = {
    "vocab_size": 7, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 128, "initializer_range": 0.3,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12,
    "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1,
}  # fmt: skip


@pytest.mark.parametrize("odd", [DeepseekV3Config(**SIZES, **LATENT), DiffLlamaConfig(**SIZES)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_of_another_size_and_attention_twice_a_layer(
    odd: Any, backend: Backend, tmp_path: Path, grow: Build, batch_of: Build, path_logprobs: Build
) -> None:
    """Latent attention has smaller values than keys, differential attention two calls a layer; whole and in parts."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(odd).save_pretrained(tmp_path)
    rng = np.random.default_rng(9)
    turns = grow(rng, 25)
    batch = batch_of(turns, rng)
    by_logprobs = {turn.logprobs.tobytes(): turn for turn in turns}
    ordered = [by_logprobs[old.tobytes()] for old in np.split(batch.logprobs, np.cumsum(batch.lengths)[:-1])]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, attn_implementation="eager")
    plain.set_experts_implementation("eager")
    expected = torch.cat(path_logprobs(plain, ordered)).detach().numpy()
    steps = []
    for budget in (WHOLE, 7):
        learner = TorchLearner(tmp_path, configure(backend, budget))
        assert abs(learner.logprobs(batch) - expected).max() < 1e-5  # their norms and experts round to float32
        steps.append(learner.step(batch).grad_norm)
    assert steps[1] == pytest.approx(steps[0], rel=1e-5)


def test_float32_is_within_its_own_rounding(model_dir: Path, grow: Build) -> None:
    batch = _bare(grow(np.random.default_rng(10), 25))
    exact = TorchLearner(model_dir, configure("dense")).logprobs(batch)
    fast = TorchLearner(model_dir, LearnerConfig()).logprobs(batch)
    assert abs(fast - exact).max() < 1e-5


def test_a_sequence_over_several_rows_is_one_ratio(
    exact: Build, model_dir: Path, plain_model: torch.nn.Module, turn: Build, path_logprobs: Build
) -> None:
    """Two trees of one rollout in two rows: sums are taken before exp, whatever the micro-batch budget."""
    turns = [turn("a", [0, 1], [2, 3], -1.0), turn("b", [1, 1], [4, 4], -1.2)]
    batch = make_batch(
        turns, rollout=[0, 0], advantage=[1.0, 1.0], weight=[0.5, 0.5], rollout_ids=["r"], budget_tokens=1
    )
    assert len(batch.rows) == 2
    config = configure("segments", 1, level="sequence", clip_high=1e9)
    metrics = exact(model_dir, config).step(batch)
    delta = torch.cat(path_logprobs(plain_model, turns)).sum() + 2 * 1.0 + 2 * float(np.float32(1.2))
    assert metrics.units == 1
    assert metrics.mean_ratio == pytest.approx(delta.exp().item(), rel=1e-10)


def test_rows_side_by_side_do_not_matter(exact: Build, model_dir: Path, grow: Build, batch_of: Build) -> None:
    rng = np.random.default_rng(3)
    batch = batch_of(grow(rng, 16), rng)
    assert len(batch.rows) > 1
    whole = replace(batch, rows=(concat(batch.rows),))
    learner = exact(model_dir, configure("segments"))
    assert abs(learner.logprobs(whole) - learner.logprobs(batch)).max() < EXACT
