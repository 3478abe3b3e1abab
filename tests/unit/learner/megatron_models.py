"""Tiny models for the Megatron tests, and tensors of `transformers` under the names that their files have."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

SHAPE = {
    "vocab_size": 7,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.4,
}
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}


def write_models(root: Path) -> None:
    """Directories `tied`, `untied`, `biased`, `grouped` (dense), `moe` and `moe-raw` (gates not renormalised)."""
    torch.manual_seed(0)
    made: dict[str, torch.nn.Module] = {
        "tied": Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=8, tie_word_embeddings=True)),
        "untied": LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_key_value_heads": 4}, tie_word_embeddings=False)),
        "biased": Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=False)),
        "moe": Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **EXPERTS, norm_topk_prob=True)),
        "moe-raw": Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **EXPERTS, norm_topk_prob=False)),
    }
    for name, model in made.items():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(("norm.weight", "bias")):  # as they are made they would hide a wrong place
                torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
        model.save_pretrained(root / name)  # type: ignore[operator]
        (root / name / "tokenizer_config.json").write_text("{}")


def in_files(named: Iterable[tuple[str, Tensor | None]]) -> dict[str, Tensor]:
    """`transformers` holds the experts of a layer in one tensor, its files hold each apart."""
    found: dict[str, Tensor] = {}
    for name, tensor in named:
        assert tensor is not None, name
        prefix, fused, kind = name.partition(".experts.")
        if not fused:
            found[name] = tensor
            continue
        for expert, one in enumerate(tensor):
            each = f"{prefix}.experts.{expert}"
            if kind == "gate_up_proj":
                found[f"{each}.gate_proj.weight"], found[f"{each}.up_proj.weight"] = one.chunk(2)
            else:
                found[f"{each}.down_proj.weight"] = one
    return found
