"""Tiny models with random weights and the plain forward that the engine is measured against."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCAB = 96
CONTEXT = 256
EOS = 1


def save_model(directory: Path, seed: int, family: str = "qwen3") -> Path:
    """A two-layer model of `family` with weights large enough that its distributions are far from uniform.

    `glm4_moe` routes with a bias that is a buffer; `long` is a qwen3 with a context of 4096.
    """
    size = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT,
        "initializer_range": 0.3, "eos_token_id": EOS, "bos_token_id": 0, "pad_token_id": 2,
    }  # fmt: skip
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
    biased = {"n_routed_experts": 4, "first_k_dense_replace": 0, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
    stretched = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    stretched |= {"factor": 2.0, "original_max_position_embeddings": 128}
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
    latent |= {"first_k_dense_replace": 2}
    configs: dict[str, tuple[type[PreTrainedModel], PreTrainedConfig]] = {
        "qwen3": (Qwen3ForCausalLM, Qwen3Config(**size, head_dim=16, tie_word_embeddings=True)),
        "qwen2": (Qwen2ForCausalLM, Qwen2Config(**size)),
        "llama": (LlamaForCausalLM, LlamaConfig(**size, tie_word_embeddings=False)),
        "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig(**size, **experts, head_dim=16)),
        "glm4_moe": (Glm4MoeForCausalLM, Glm4MoeConfig(**size, **experts, **biased, head_dim=16)),
        "long": (Qwen3ForCausalLM, Qwen3Config(**size | {"max_position_embeddings": 4096}, head_dim=64)),
        "sliding": (Qwen2ForCausalLM, Qwen2Config(**size, **window)),
        "wide window": (Phi3ForCausalLM, Phi3Config(**size, sliding_window=100)),
        "window by mask": (PhimoeForCausalLM, PhimoeConfig(**size, num_local_experts=4, sliding_window=100)),
        "stretched": (LlamaForCausalLM, LlamaConfig(**size, rope_parameters=stretched)),
        "twice a layer": (DiffLlamaForCausalLM, DiffLlamaConfig(**size)),
        "latent": (DeepseekV3ForCausalLM, DeepseekV3Config(**size | {"num_key_value_heads": 4}, **latent)),
    }  # fmt: skip
    kind, config = configs[family]
    torch.manual_seed(seed)
    model = kind(config)
    for name, buffer in model.named_buffers():
        if name.endswith("bias"):
            buffer.copy_(torch.randn(buffer.shape))
    model.save_pretrained(directory)
    return directory


def save_tokenizer(directory: Path) -> None:
    """A tokenizer of words w3, w4, ... for the ids 3, 4, ..., separated by spaces, beside a model."""
    words = Tokenizer(WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}, "<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>").save_pretrained(directory)


def plain_model(directory: Path) -> PreTrainedModel:
    """The reference: the same directory with eager attention in float32."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    loaded: PreTrainedModel = model.eval()
    return loaded


def plain_logprobs(model: PreTrainedModel, ids: list[int], temperature: float = 1.0) -> list[float]:
    """log p(ids[i] | ids[:i]) for i >= 1 by one forward without any cache."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].float() / temperature
    chosen = torch.log_softmax(logits, dim=-1).gather(1, torch.tensor(ids[1:])[:, None])
    values: list[float] = chosen[:, 0].tolist()
    return values
