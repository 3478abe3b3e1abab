"""The model in memory: loading, replacing its weights, and running one packed step.

Owns the weights and their version. Invariant: weights are replaced whole or not at all; a checkpoint that lacks a
tensor or has another shape is refused before the first byte is copied.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from kat_stream.engines.embedded.attention import IMPLEMENTATION
from kat_stream.engines.embedded.graph import StepInput, StepModule, build_step
from kat_stream.engines.embedded.kv import KvStore
from kat_stream.engines.embedded.routes import Recorder
from kat_stream.errors import ConfigError, DataError

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: dict[Dtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# A server prints no progress bars.
transformers_logging.disable_progress_bar()


def load_weights(path: Path) -> PreTrainedModel:
    """A complete float32 model from a Hugging Face directory with safetensors; raises DataError naming what is
    wrong."""
    if not (path / "config.json").is_file():
        raise DataError(f"{path}: no config.json, so not a model directory")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32,
            attn_implementation=IMPLEMENTATION,
            output_loading_info=True,
            local_files_only=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise DataError(f"{path}: cannot be loaded: {error}") from error
    model: PreTrainedModel = loaded[0]
    report: dict[str, Any] = loaded[1]
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if report[kind]:
            raise DataError(f"{path}: {kind.replace('_', ' ')}: {sorted(map(str, report[kind]))[:5]}")
    # `from_pretrained` returns a model in evaluation mode.
    model.requires_grad_(False)
    return model


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase | None:
    """The directory's tokenizer, or None where there is none: the engine then speaks token ids only."""
    if not any((path / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, local_files_only=True)
    return tokenizer


def stop_ids(path: Path, config: Any, tokenizer: PreTrainedTokenizerBase | None) -> frozenset[int]:
    """End-of-sequence ids of the generation config, else of the model config, and the tokenizer's own."""
    named = config.eos_token_id
    if (path / "generation_config.json").is_file():
        named = GenerationConfig.from_pretrained(path).eos_token_id or named
    ids = set(named if isinstance(named, list) else [named])
    if tokenizer is not None:
        ids.add(tokenizer.eos_token_id)
    return frozenset(token for token in ids if token is not None)


def _shape(config: Any) -> tuple[int, int, int]:
    heads = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or heads, dim


class ModelRunner:
    """Runs steps. `context` is the longest sequence in tokens; `vocab` the number of rows of the embedding.

    In half precision the step is checked in float32 first, where a wrong attention shows, and then runs eagerly; so it
    does to record the routing of experts, which a trace would leave out.
    """

    def __init__(
        self, path: Path, slots: int, version: str, dtype: Dtype = "float32", *, record_routing: bool = False
    ) -> None:
        self.path = path
        self.version = version
        self.dtype = dtype
        self.model = load_weights(path)
        self.tokenizer = load_tokenizer(path)
        config = self.model.config.get_text_config()
        self.eos = stop_ids(path, config, self.tokenizer)
        self.vocab = int(config.vocab_size)
        self.context = min(int(config.max_position_embeddings), slots)
        layers, groups, dim = _shape(config)
        with torch.inference_mode():
            self.kv = KvStore(layers, slots, groups, dim, DTYPES[dtype])
            trial = KvStore(layers, 128, groups, dim, torch.float32)
            self._step = build_step(self.model, trial.pool, trial.dense, self.vocab)
            # Parameters alone, as in transformers: rotary frequencies and routing biases are buffers and stay float32.
            for parameter in self.model.parameters():
                parameter.data = parameter.data.to(DTYPES[dtype])
            if dtype != "float32" or record_routing:
                self._step = StepModule(self.model)
        self._recorder = Recorder(self.model) if record_routing else None
        if self._recorder is not None:
            self.kv.record(self._recorder.routing.width)

    @property
    def traced(self) -> bool:
        """Whether a step is one traced call; otherwise it runs eagerly."""
        return isinstance(self._step, torch.jit.ScriptModule)

    def run(self, batch: StepInput) -> tuple[list[int], list[float], list[float]]:
        """Tokens [K], their log-probs [K], and prompt log-probs [M] of one step."""
        tokens, logprobs, prompt = self._step(*batch.tensors(), self.kv.pool, self.kv.dense)
        if self._recorder is not None and self.kv.routes is not None:
            self.kv.routes[batch.slots] = self._recorder.take(len(batch.slots))
        return tokens.tolist(), logprobs.tolist(), prompt.tolist()

    def replace(self, source: PreTrainedModel, path: Path, version: str) -> None:
        """Copy all weights of `source` into the running model: parameters, and buffers that a checkpoint holds, such
        as the routing bias of some mixtures of experts. Raises DataError if the architectures differ."""
        own, new = self.model.state_dict(), source.state_dict()
        if {n: w.shape for n, w in own.items()} != {n: w.shape for n, w in new.items()}:
            raise DataError(f"{path}: its weights are not those of {self.path}")
        for name, weight in own.items():
            weight.copy_(new[name])
        self.path, self.version = path, version


def require_room(slots: int, running: int) -> None:
    """Raise ConfigError for sizes that can serve nothing."""
    if slots < 128 or running < 1:
        raise ConfigError(f"max_total_tokens={slots} (>= 128), max_running={running} (>= 1)")
