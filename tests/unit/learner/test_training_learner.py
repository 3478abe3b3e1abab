"""The learner as its service uses it: steps, stops, metrics, published weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BlenderbotSmallConfig,
    BloomConfig,
    GptOssConfig,
    Lfm2Config,
    MistralConfig,
    MistralForCausalLM,
    MptConfig,
    Phi3Config,
    PhimoeConfig,
    PreTrainedConfig,
    Qwen3_5TextConfig,
    RobertaConfig,
)

from kat_stream.errors import BatchError, CheckpointError, ConfigError, StepCancelled
from kat_stream.rl.settings import RatioConfig
from kat_stream.training.attention import NAME
from kat_stream.training.learner import LearnerConfig, TorchLearner
from kat_stream.training.publication import weights_checksum
from kat_stream.trees import TrainBatch, make_batch

Build = Callable[..., Any]


@pytest.fixture
def batch(grow: Build, batch_of: Build) -> TrainBatch:
    rng = np.random.default_rng(3)
    made: TrainBatch = batch_of(grow(rng, 24), rng)
    return made


def weights(learner: TorchLearner) -> list[torch.Tensor]:
    return [value.detach().clone() for value in learner.model.parameters()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_rewarded_turns_become_likelier(model_dir: Path, turn: Build) -> None:
    learner = TorchLearner(model_dir, LearnerConfig(learning_rate=3e-3, warmup_steps=1))
    turns = [turn("good", [0, 1], [2, 3, 4]), turn("bad", [0, 1], [5, 6])]

    def current() -> TrainBatch:
        bare = make_batch(
            turns, rollout=[0, 1], advantage=[1.0, -1.0], weight=[1.0, 1.0], rollout_ids=["g", "b"], budget_tokens=99
        )
        return replace(bare, logprobs=learner.logprobs(bare).astype(np.float32))

    before = current().logprobs
    for _ in range(5):
        metrics = learner.step(current())
        assert metrics.mean_ratio == pytest.approx(1, abs=1e-5)
        assert metrics.clip_fraction == 0
    after = current().logprobs
    assert after[:3].sum() > before[:3].sum() + 0.1
    assert after[3:].sum() < before[3:].sum() - 0.1


def test_sft_learns_its_demonstration(model_dir: Path, turn: Build) -> None:
    learner = TorchLearner(model_dir, LearnerConfig(loss="sft", learning_rate=1e-2, warmup_steps=1))
    demo = make_batch(
        [turn("d", [0], [1, 2, 3, 4, 5, 6])],
        rollout=[0],
        advantage=[0.0],
        weight=[1.0],
        rollout_ids=["d"],
        budget_tokens=9,
    )
    losses = [learner.step(demo).loss for _ in range(20)]
    assert losses[0] == pytest.approx(-TorchLearner(model_dir, LearnerConfig()).logprobs(demo).mean(), abs=1e-5)
    assert losses[-1] < 0.3 * losses[0]


def test_metrics_say_what_happened(model_dir: Path, batch: TrainBatch) -> None:
    learner = TorchLearner(model_dir, LearnerConfig(learning_rate=1e-3, warmup_steps=4))
    logp = learner.logprobs(batch)
    metrics = learner.step(replace(batch, ages=(0, 3, 1)))
    assert (metrics.step, metrics.applied) == (1, True)
    assert metrics.learning_rate == pytest.approx(2.5e-4)
    assert metrics.log_ratio_abs == pytest.approx(np.abs(logp - batch.logprobs).mean(), rel=1e-4)
    assert metrics.entropy == pytest.approx(-logp.mean(), rel=1e-4)
    k = np.exp(logp - batch.logprobs)
    assert metrics.masked_fraction == pytest.approx(((k < 0.5) | (k > 5)).mean())
    assert 0 < metrics.masked_fraction < 1
    assert metrics.tree_ratio == batch.flat_tokens / batch.tree_tokens > 1
    assert (metrics.staleness_mean, metrics.staleness_max) == (pytest.approx(4 / 3), 3)
    assert metrics.as_dict()["turns"] == 24


def test_micro_batches_do_not_change_the_step(model_dir: Path, batch: TrainBatch) -> None:
    config = LearnerConfig(dtype="float64")
    whole = TorchLearner(model_dir, config).step(batch)
    parts = TorchLearner(model_dir, replace(config, micro_batch_tokens=1)).step(batch)
    # The norms of transformers round gradients through float32, once a micro-batch.
    assert parts.grad_norm == pytest.approx(whole.grad_norm, rel=1e-6)
    assert parts.loss == pytest.approx(whole.loss, abs=1e-12)
    assert parts.clip_fraction == whole.clip_fraction


def test_a_stop_between_micro_batches_changes_nothing(model_dir: Path, batch: TrainBatch) -> None:
    learner = TorchLearner(model_dir, LearnerConfig(micro_batch_tokens=1))
    before, asked = weights(learner), []

    def stop_at_second() -> bool:
        asked.append(1)
        return len(asked) == 2

    with pytest.raises(StepCancelled, match="step 1 was stopped"):
        learner.step(batch, stop_at_second)
    assert same(before, weights(learner))
    fresh = TorchLearner(model_dir, LearnerConfig(micro_batch_tokens=1))
    assert learner.step(batch).grad_norm == fresh.step(batch).grad_norm
    assert same(weights(learner), weights(fresh))


def test_a_gradient_that_is_not_finite_is_not_applied(model_dir: Path, batch: TrainBatch) -> None:
    config = LearnerConfig(ratio=RatioConfig(dual_clip=None, mask_high=float("inf"), mask_low=0.0))
    learner = TorchLearner(model_dir, config)
    before = weights(learner)
    unlikely = replace(batch, logprobs=np.full_like(batch.logprobs, -400.0), advantage=-np.ones_like(batch.advantage))
    metrics = learner.step(unlikely)
    assert not metrics.applied
    assert learner.step_count == 1
    assert same(before, weights(learner))
    assert learner.step(batch).applied


def test_a_skipped_step_only_counts(model_dir: Path) -> None:
    learner = TorchLearner(model_dir, LearnerConfig())
    before = weights(learner)
    learner.skip_step()
    assert learner.step_count == 1
    assert same(before, weights(learner))


def test_stale_turns_without_weight_leave_no_trace(model_dir: Path, batch: TrainBatch) -> None:
    """A turn of weight 0 may be as odd as it likes."""
    weight = batch.weight.copy()
    weight[0] = 0
    odd = batch.logprobs.copy()
    odd[: batch.lengths[0]] = -400
    config = LearnerConfig(ratio=RatioConfig(mask_low=0.0, mask_high=float("inf"), dual_clip=None))
    plain, strange = (
        TorchLearner(model_dir, config).step(replace(batch, weight=weight, logprobs=logprobs))
        for logprobs in (batch.logprobs, odd)
    )
    assert plain.grad_norm == strange.grad_norm
    assert plain.mean_ratio == strange.mean_ratio
    assert plain.units == 23


def test_published_weights_are_a_model_that_others_load(model_dir: Path, batch: TrainBatch, tmp_path: Path) -> None:
    learner = TorchLearner(model_dir, LearnerConfig())
    learner.step(batch)
    first = learner.publish(tmp_path / "weights" / "a.1")
    assert sorted(p.name for p in (tmp_path / "weights").iterdir()) == ["a.1"]
    assert first.checksum == weights_checksum(first.path)
    assert (first.path / "tokenizer_config.json").is_file()
    assert "kat_tree" not in (first.path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(first.path, dtype=torch.float32)
    mine = learner.model.state_dict()
    assert all(torch.equal(value, mine[name]) for name, value in loaded.state_dict().items())
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()

    learner.step(batch)
    second = learner.publish(tmp_path / "weights" / "a.2")
    assert second.checksum != first.checksum
    with pytest.raises(CheckpointError, match=r"a\.2 exists"):
        learner.publish(tmp_path / "weights" / "a.2")


def test_weights_that_changed_on_disk_have_another_checksum(model_dir: Path, tmp_path: Path) -> None:
    published = TorchLearner(model_dir, LearnerConfig()).publish(tmp_path / "a.0")
    file = published.path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    assert weights_checksum(published.path) != published.checksum
    file.unlink()
    with pytest.raises(CheckpointError, match="no \\*.safetensors"):
        weights_checksum(published.path)


def test_a_batch_that_does_not_fit_is_refused(model_dir: Path, turn: Build, batch: TrainBatch) -> None:
    learner = TorchLearner(model_dir, LearnerConfig())

    def one(prompt: list[int], sampled: list[int]) -> TrainBatch:
        turns = [turn("t", prompt, sampled)]
        return make_batch(turns, rollout=[0], advantage=[1.0], weight=[1.0], rollout_ids=["r"], budget_tokens=9)

    with pytest.raises(BatchError, match="129 tokens, the model has 128 positions"):
        learner.step(one([0] * 128, [1]))
    with pytest.raises(BatchError, match="id 7 is outside the vocabulary of 7"):
        learner.step(one([0], [7]))
    with pytest.raises(BatchError, match="nothing to learn from"):
        learner.step(replace(batch, weight=np.zeros_like(batch.weight)))
    with pytest.raises(BatchError, match="no turns"):
        learner.step(make_batch([], rollout=[], advantage=[], weight=[], rollout_ids=[], budget_tokens=9))


def test_attention_that_is_no_tree_is_refused(tmp_path: Path) -> None:
    """A sliding window cuts paths, which the tree mask cannot say."""
    config = MistralConfig(
        vocab_size=7, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, sliding_window=4, max_position_embeddings=32,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="sliding window"):
        TorchLearner(tmp_path, LearnerConfig())
    assert json.loads((tmp_path / "config.json").read_text())["sliding_window"] == 4


SMALL: dict[str, Any] = {
    "vocab_size": 7, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "max_position_embeddings": 64, "initializer_range": 0.4,
}  # fmt: skip
LINEAR = {f"linear_{name}": 8 for name in ("key_head_dim", "value_head_dim")} | {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_conv_kernel_dim": 4, "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
LONG = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "factor": 8.0,
}
OTHER = "a branch of a tree has other logits than its path alone"
NOT_FOR_TREES: list[tuple[str, Callable[[], PreTrainedConfig]]] = [
    ("layers of type linear_attention", lambda: Qwen3_5TextConfig(**SMALL, **LINEAR)),
    ("layers of type conv", lambda: Lfm2Config(**SMALL, full_attn_idxs=[1], block_auto_adjust_ff_dim=False)),
    ("RoPE of type longrope", lambda: Phi3Config(
        **SMALL, pad_token_id=0, original_max_position_embeddings=8,
        rope_parameters={**LONG, "original_max_position_embeddings": 8},
    )),
    ("it does not run", lambda: MptConfig(vocab_size=7, d_model=32, n_layers=2, n_heads=4)),
    ("cannot have a sliding window", lambda: PhimoeConfig(**SMALL, num_local_experts=4, sliding_window=32)),
    ("cannot have attention sinks", lambda: GptOssConfig(
        **SMALL, head_dim=8, layer_types=["full_attention"] * 2, num_local_experts=4, num_experts_per_tok=2
    )),
    (OTHER, lambda: BloomConfig(
        vocab_size=7, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.4
    )),
    (OTHER, lambda: BlenderbotSmallConfig(  # takes no positions; its own are mild
        vocab_size=7, d_model=32, decoder_layers=4, decoder_attention_heads=4, decoder_ffn_dim=48, encoder_layers=1,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )),
    (OTHER, lambda: RobertaConfig(**SMALL, is_decoder=True)),  # its own begin at 2
]  # fmt: skip


@pytest.mark.parametrize(("reason", "config"), NOT_FOR_TREES)
def test_a_model_whose_paths_would_not_run_as_alone_is_refused_when_it_is_loaded(
    reason: str, config: Callable[[], PreTrainedConfig], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config()).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"trees.* {reason}"):
        TorchLearner(tmp_path, LearnerConfig())


def test_looking_at_a_model_leaves_it_and_the_chance_as_they_were(model_dir: Path) -> None:
    before = torch.get_rng_state()
    learner = TorchLearner(model_dir, LearnerConfig())
    assert torch.equal(before, torch.get_rng_state())
    assert learner.model.config._attn_implementation == NAME
    assert all(value.grad is None for value in learner.model.parameters())
