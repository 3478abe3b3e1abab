"""Random turns and tiny models, and the reference they are held against: each path alone, padded, plain attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from kat_stream.trees import TrainBatch, TurnTokens, make_batch
from tests.unit.learner.megatron_models import write_models

VOCABULARY = 7
RandomTurns = Callable[[np.random.Generator, int], list[TurnTokens]]
MakeBatch = Callable[..., TrainBatch]
PathLogprobs = Callable[[torch.nn.Module, Sequence[TurnTokens]], list[Tensor]]


def turn(name: str, prompt: Sequence[int], sampled: Sequence[int], logprob: float = -1.5) -> TurnTokens:
    return TurnTokens(
        name, np.array(prompt, np.int32), np.array(sampled, np.int32), np.full(len(sampled), logprob, np.float32)
    )


def grow(rng: np.random.Generator, count: int) -> list[TurnTokens]:
    """Turns on a random forest: continued paths, forks inside a turn, chance merges, prefix paths, equal paths."""
    paths: list[list[int]] = [[int(rng.integers(VOCABULARY))] for _ in range(2)]
    turns: list[TurnTokens] = []
    for number in range(count):
        base = paths[int(rng.integers(len(paths)))]
        keep = int(rng.integers(1, len(base) + 1)) if rng.random() < 0.4 else len(base)
        extra = rng.integers(0, VOCABULARY, rng.integers(0, 4)).tolist()
        prompt = base[:keep] + extra
        sampled = rng.integers(0, VOCABULARY, rng.integers(1, 6)).tolist()
        logprobs = -rng.uniform(0.5, 3.0, len(sampled)).astype(np.float32)
        turns.append(TurnTokens(str(number), np.array(prompt, np.int32), np.array(sampled, np.int32), logprobs))
        if len(prompt) + len(sampled) < 40:
            paths.append(prompt + sampled)
    return turns


def batch_of(turns: Sequence[TurnTokens], rng: np.random.Generator, rollouts: int = 3) -> TrainBatch:
    owner = np.sort(rng.integers(0, rollouts, len(turns)))
    return make_batch(
        turns,
        rollout=owner,
        advantage=rng.standard_normal(rollouts)[owner],
        weight=rng.uniform(0.2, 1.0, len(turns)),
        rollout_ids=[f"r{i}" for i in range(rollouts)],
        budget_tokens=48,
    )


def path_logprobs(model: torch.nn.Module, turns: Sequence[TurnTokens]) -> list[Tensor]:
    """Every turn's own path, right-padded into one batch; log-probs of its sampled tokens."""
    paths = [torch.tensor(np.concatenate([t.prompt_ids, t.sampled_ids]), dtype=torch.int64) for t in turns]
    ids = torch.nn.utils.rnn.pad_sequence(paths, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(path) for path in paths], batch_first=True)
    logp = model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
    rows = []
    for k, (t, path) in enumerate(zip(turns, paths, strict=True)):
        at = torch.arange(len(t.prompt_ids), len(path))
        rows.append(logp[k, at - 1, path[at]])
    return rows


def float64_norms[M: torch.nn.Module](model: M) -> M:
    """The same model with norms that stay in float64: those of `transformers` round through float32."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm") and not isinstance(child, torch.nn.RMSNorm):
                norm = torch.nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(parent, name, norm)
    return model


@pytest.fixture(name="float64_norms")
def float64_norms_fixture() -> Callable[[torch.nn.Module], torch.nn.Module]:
    return float64_norms


@pytest.fixture(name="grow")
def grow_fixture() -> RandomTurns:
    return grow


@pytest.fixture(name="batch_of")
def batch_of_fixture() -> MakeBatch:
    return batch_of


@pytest.fixture(name="turn")
def turn_fixture() -> Callable[..., TurnTokens]:
    return turn


@pytest.fixture(name="path_logprobs")
def path_logprobs_fixture() -> PathLogprobs:
    return path_logprobs


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny matrices on a shared machine: more threads only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3, three layers, two key heads for four query heads, tied embeddings."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
        max_position_embeddings=128,
        initializer_range=0.4,
    )
    directory = tmp_path_factory.mktemp("qwen3")
    Qwen3ForCausalLM(config).save_pretrained(directory)
    (directory / "tokenizer_config.json").write_text("{}")
    return directory


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another architecture, untied."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
        max_position_embeddings=128,
        initializer_range=0.4,
    )
    directory = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories of `megatron_models.write_models`; nobody writes there."""
    root = tmp_path_factory.mktemp("models")
    write_models(root)
    return root


@pytest.fixture
def plain_model(model_dir: Path) -> torch.nn.Module:
    """The same weights with the model's own attention, in float64 (`eager` would take its softmax in float32)."""
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float64, attn_implementation="sdpa"
    )
    return float64_norms(model)
