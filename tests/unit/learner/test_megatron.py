"""The Megatron learner on one rank is the torch learner: values, every gradient, steps, checkpoints, weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import MistralConfig, Qwen3Config, Qwen3MoeConfig

from kat_stream.config import load
from kat_stream.errors import CheckpointError, ConfigError
from kat_stream.rl.settings import RatioConfig
from kat_stream.training.attention import DensePlan
from kat_stream.training.checkpoint import Checkpoint, CheckpointStore, latest_checkpoint
from kat_stream.training.gateways import Gateways
from kat_stream.training.learner import LearnerConfig, TorchLearner
from kat_stream.training.megatron.model import check
from kat_stream.training.megatron.ranks import MegatronLeader, Order, World
from kat_stream.training.megatron.weights import Shards
from kat_stream.training.rows import edge_values, make_micro_batch, part_inputs
from kat_stream.trees import TrainBatch
from tests.unit.learner.megatron_models import in_files

Build = Callable[..., Any]
Open = Callable[..., MegatronLeader]
DENSE = ("tied", "untied", "biased")
MIXTURES = ("moe", "moe-raw")
CONFIG = LearnerConfig(ratio=RatioConfig(mask="none"), learning_rate=1e-3, warmup_steps=1)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    opened = World(1, threads=1, step_s=120.0)
    yield opened
    opened.close()


@pytest.fixture
def megatron(world: World) -> Iterator[Open]:
    """Learners of one rank; each is the one in use until the next is opened."""
    opened: list[MegatronLeader] = []

    def make(directory: Path, config: LearnerConfig = CONFIG) -> MegatronLeader:
        if opened:
            opened.pop().part()
        opened.append(MegatronLeader(world, Order(directory, config, 1, 1, world.wait_s)))
        return opened[-1]

    yield make
    if opened:
        opened.pop().part()


@pytest.fixture
def torch_learner(float64_norms: Build) -> Callable[..., TorchLearner]:
    def make(directory: Path, config: LearnerConfig = CONFIG) -> TorchLearner:
        learner = TorchLearner(directory, config)
        if config.dtype == "float64":
            float64_norms(learner.model)
        return learner

    return make


@pytest.fixture
def batch(grow: Build, batch_of: Build) -> TrainBatch:
    rng = np.random.default_rng(3)
    made: TrainBatch = batch_of(grow(rng, 24), rng)
    assert made.tree_tokens < 0.8 * made.flat_tokens
    return made


@pytest.mark.parametrize("name", [*DENSE, *MIXTURES])
@pytest.mark.parametrize("micro", [4096, 25])
def test_two_steps_are_those_of_the_torch_learner(
    name: str, micro: int, models: Path, megatron: Open, torch_learner: Build, batch: TrainBatch
) -> None:
    """Dense models to the rounding of float64; routers round through float32 in both libraries. 25 tokens: in parts."""
    exact = name in DENSE
    config = replace(CONFIG, micro_batch_tokens=micro, dtype="float64" if exact else "float32")
    mine, theirs = megatron(models / name, config), torch_learner(models / name, config)
    bound = 1e-11 if exact else 1e-5
    assert abs(mine.logprobs(batch) - theirs.logprobs(batch)).max() < bound
    for _ in range(2):
        own, other = mine.step(batch).as_dict(), theirs.step(batch).as_dict()
        for key in own.keys() - {"seconds", "tokens_per_second"}:
            assert own[key] == pytest.approx(other[key], rel=bound, abs=bound), key
    # Adam divides a gradient by its own size: one of 1e-9 amplifies rounding a thousandfold.
    assert abs(mine.logprobs(batch) - theirs.logprobs(batch)).max() < 20 * bound


@pytest.mark.parametrize("name", ["tied", "moe"])
def test_every_gradient_is_that_of_the_torch_learner(
    name: str, models: Path, megatron: Open, torch_learner: Build, batch: TrainBatch
) -> None:
    config = replace(CONFIG, dtype="float64") if name in DENSE else CONFIG
    mine, theirs = megatron(models / name, config), torch_learner(models / name, config)
    micro = make_micro_batch(batch, [0], 4096)
    weights = torch.from_numpy(np.random.default_rng(4).standard_normal(len(micro.targets)))
    for model in (mine.model, theirs.model):
        values = edge_values(model, part_inputs(micro, 0, "segments", CPU), Gateways())
        torch.autograd.backward((weights.to(values) * values[0]).sum())
    found = Shards(mine.model).gather({name: p.grad for name, p in mine.model.gpt.named_parameters()})
    expected = in_files((name, p.grad) for name, p in theirs.model.named_parameters())
    assert found.keys() == expected.keys()
    bound = 1e-12 if name in DENSE else 1e-5
    for key, value in expected.items():
        assert float((found[key] - value).abs().max()) <= bound * max(1.0, float(value.abs().max())), key


@pytest.mark.parametrize("control", ["causal mask", "row positions"])
def test_the_comparison_has_power(
    control: str, models: Path, megatron: Open, torch_learner: Build, batch: TrainBatch
) -> None:
    mine, theirs = megatron(models / "tied").model, torch_learner(models / "tied").model
    micro = make_micro_batch(batch, [0], 4096)
    size = len(micro.layout)
    inputs = part_inputs(micro, 0, "dense", CPU)
    causal = DensePlan(torch.ones(size, size, dtype=torch.bool).tril()[None, None])
    wrong = {"plan": causal} if control == "causal mask" else {"pos": torch.arange(size)[None]}
    with torch.no_grad():
        expected = edge_values(theirs, inputs, Gateways())
        assert float((edge_values(mine, inputs, Gateways()) - expected).abs().max()) < 1e-5
        assert float((edge_values(mine, replace(inputs, **wrong), Gateways()) - expected).abs().max()) > 1e-2


@pytest.mark.parametrize("name", [*DENSE, *MIXTURES])
def test_weights_come_back_to_the_bit_and_load_in_transformers(
    name: str, models: Path, megatron: Open, torch_learner: Build, batch: TrainBatch, tmp_path: Path
) -> None:
    learner = megatron(models / name)
    learner.publish(tmp_path / "untouched")
    before, after = (load_file(path / "model.safetensors") for path in (models / name, tmp_path / "untouched"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    learner.step(batch)
    learner.publish(tmp_path / "stepped")
    assert not all(torch.equal(value, before[key]) for key, value in learner.state_dict()["model"].items())
    again = torch_learner(tmp_path / "stepped")
    assert abs(again.logprobs(batch) - learner.logprobs(batch)).max() < 1e-5
    assert (tmp_path / "stepped" / "tokenizer_config.json").is_file()


@pytest.mark.parametrize("name", ["tied", "moe"])
def test_a_resumed_learner_goes_on_to_the_bit(
    name: str, models: Path, megatron: Open, batch: TrainBatch, tmp_path: Path
) -> None:
    learner = megatron(models / name)
    for _ in range(2):
        learner.step(batch)
    store = CheckpointStore(tmp_path, "a")
    store.open()
    store.save(Checkpoint(state=learner.state_dict(), lineage="a", positions={}, manifest=()), keep=1)
    ahead, weights = learner.step(batch), learner.state_dict()["model"]
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.step == 2

    resumed = megatron(models / name)
    resumed.load(checkpoint.state)
    again = resumed.step(batch)
    assert (again.step, again.loss, again.grad_norm) == (3, ahead.loss, ahead.grad_norm)
    found = resumed.state_dict()["model"]
    assert all(torch.equal(found[key], weights[key]) for key in weights)

    zeros = {key: torch.zeros_like(value) for key, value in weights.items()}
    bare = megatron(models / name)
    bare.load({**checkpoint.state, "optimizer": {"step": 0.0, "exp_avg": zeros, "exp_avg_sq": zeros}})
    bare.step(batch)
    found = bare.state_dict()["model"]
    assert not all(torch.equal(found[key], weights[key]) for key in weights), "moments matter, the test can fail"


def test_what_is_another_model_is_refused(models: Path, megatron: Open, torch_learner: Build, tmp_path: Path) -> None:
    learner = megatron(models / "tied")
    with pytest.raises(CheckpointError, match="of the torch learner"):
        learner.load(torch_learner(models / "tied").state_dict())
    state = learner.state_dict()
    with pytest.raises(CheckpointError, match="of the megatron learner"):
        torch_learner(models / "tied").load(state)
    with pytest.raises(CheckpointError, match="of another model"):
        megatron(models / "untied").load(state)
    MistralConfig(vocab_size=7).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="model type mistral"):
        megatron(tmp_path)
    with pytest.raises(ConfigError, match="a sliding window"):
        check(Qwen3Config(num_hidden_layers=1, layer_types=["sliding_attention"]), 1, 1)
    with pytest.raises(ConfigError, match="gate is constant"):
        check(Qwen3MoeConfig(num_experts_per_tok=1, norm_topk_prob=True), 1, 1)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (['learner="megatron"', "ranks=2", "megatron.tensor_parallel=4"], "a multiple of megatron's 4 x 1"),
        (['learner="megatron"', "ranks=2", 'sharding="full"'], "of the torch learner"),
        (["megatron.expert_parallel=2", "ranks=2"], 'need learner = "megatron"'),
    ],
)
def test_ranks_that_cannot_be_divided_are_refused_when_the_file_is_read(settings: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load(None, [f"trainer.{setting}" for setting in settings])
