"""A Hugging Face decoder as a Megatron-Core model that runs trees, called as `transformers` models are.

Owns the translation of the configuration, and what a tree needs of the layers: our attention in the place of the
layer spec's core attention, RoPE at path positions, and the gather of edge sources (each target's parent) before the
output layer. Invariant: the function computed is that of the Hugging Face model; a configuration that would make it
another one is a `ConfigError`.
No dropout, no fused kernels that only CUDA has. Transformer Engine's layer spec is not used anywhere: its linear layers
own the norms, which is another weight mapping (see docs/training.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from kat_stream.errors import ConfigError
from kat_stream.training.attention import Plan, tree_attention
from kat_stream.training.gateways import Gateways
from kat_stream.training.megatron.exchange import collect_rows, gather_rows, row_counts, share_columns, share_rows

FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe")


@dataclass(frozen=True, eq=False, slots=True)
class _Tree:
    """What every layer is handed as its attention mask."""

    plan: Plan
    gateways: Gateways


@dataclass(frozen=True, eq=False, slots=True)
class _Output:
    logits: Tensor
    """float[1, rows, vocabulary]."""


class TreeModel(torch.nn.Module):
    """A rank's shard of the model. `config` is the Hugging Face configuration."""

    inverse_frequency: Tensor

    def __init__(self, config: Any, dtype: torch.dtype, *, tensor_parallel: int, expert_parallel: int) -> None:
        super().__init__()
        check(config, tensor_parallel, expert_parallel)
        self.config = config
        self.gpt: Any = GPTModel(
            config=_translate(config, dtype, tensor_parallel, expert_parallel),
            transformer_layer_spec=_layer_spec(config),
            vocab_size=config.vocab_size + -config.vocab_size % tensor_parallel,
            max_sequence_length=config.max_position_embeddings,
            position_embedding_type="none",
            share_embeddings_and_output_weights=config.tie_word_embeddings,
        ).to(dtype)  # Megatron leaves norms in float32
        self.register_buffer("inverse_frequency", _inverse_frequency(config), persistent=False)
        if _experts(config):
            for layer in self.gpt.decoder.layers:
                layer.mlp.token_dispatcher = _dispatcher(self.gpt, layer.mlp)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        logits_to_keep: Tensor,
        tree_plan: Plan,
        tree_gateways: Gateways,
        **_: Any,
    ) -> _Output:
        """int64[1, n] ids and path positions, int64[rows] sources of edges -> logits of these rows alone.

        What else `transformers` models are given is ignored: there is no cache, and recorded routes are not replayed.
        """
        hidden = self.gpt.embedding(input_ids=input_ids, position_ids=position_ids)
        angles = position_ids[0, :, None].float() * self.inverse_frequency
        hidden = self.gpt.decoder(
            hidden_states=hidden,
            attention_mask=_Tree(tree_plan, tree_gateways),
            rotary_pos_emb=torch.cat([angles, angles], dim=-1)[:, None, None],
        )
        shared = self.gpt.shared_embedding_or_output_weight() if self.config.tie_word_embeddings else None
        logits, _ = self.gpt.output_layer(hidden.index_select(0, logits_to_keep), weight=shared)
        if self.gpt.pg_collection.tp.size() > 1:
            logits = share_columns(logits, self.gpt.pg_collection.tp)
        return _Output(logits[..., : self.config.vocab_size].transpose(0, 1))


class TreeAttention(torch.nn.Module):
    """Core attention of the layer spec: the torch learner's plans and gateways on a rank's heads."""

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: _Tree, **_: Any) -> Tensor:
        """[n, 1, heads, size] -> [n, 1, heads * size]."""
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        tree = attention_mask
        out, _none = tree_attention(self, query, key, value, tree_plan=tree.plan, tree_gateways=tree.gateways)
        return out.transpose(0, 1).flatten(2)


class TreeRouter(TopKRouter):  # type: ignore[misc]
    """Megatron's own first moves its weight to the current CUDA device."""

    def gating(self, input: Tensor) -> Tensor:
        """Logits of all experts."""
        return torch.nn.functional.linear(input, self.weight)


class TreeDispatcher(MoEAllGatherTokenDispatcher):  # type: ignore[misc]
    """Every rank sees the tokens of all ranks, however many each has, and runs its own experts on them."""

    routing_map: Tensor
    counts: list[int]

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """[n, hidden] and [n, experts] of this rank -> of all ranks."""
        group = self.tp_ep_group
        if group.size() == 1:
            return hidden_states, probs
        self.counts = row_counts(hidden_states, group)
        self.routing_map = gather_rows(self.routing_map.byte(), group, self.counts).bool()
        return share_rows(hidden_states, group, self.counts), share_rows(probs, group, self.counts)

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """What all experts have for this rank's tokens."""
        group = self.tp_ep_group
        return hidden_states if group.size() == 1 else collect_rows(hidden_states, group, self.counts)


def check(config: Any, tensor_parallel: int, expert_parallel: int) -> None:
    """`ConfigError` for a model that Megatron would run as another function, or that cannot be cut so."""
    rope = getattr(config, "rope_parameters", None) or {}
    experts = _experts(config)
    wrong = {
        f"model type {config.model_type}, expected one of {', '.join(FAMILIES)}": config.model_type not in FAMILIES,
        f"RoPE of type {rope.get('rope_type')}": rope.get("rope_type", "default") != "default",
        f"activation {config.hidden_act}": config.hidden_act != "silu",
        "a sliding window": bool(getattr(config, "use_sliding_window", False))
        or any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()),
        "biases in attention or MLP": bool(getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", 0)),
        "layers with and without experts": bool(experts)
        and (config.decoder_sparse_step != 1 or bool(config.mlp_only_layers)),
        "one expert a token, whose renormalised gate is constant": bool(experts)
        and config.num_experts_per_tok == 1
        and config.norm_topk_prob,
        "experts and tensor parallelism at once": bool(experts) and tensor_parallel > 1,
        "no experts for expert_parallel": not experts and expert_parallel > 1,
        f"{experts} experts over {expert_parallel} ranks": bool(experts and experts % expert_parallel),
        f"{config.num_key_value_heads} key heads, {config.num_attention_heads} query heads or "
        f"{config.intermediate_size} inner columns over {tensor_parallel} ranks": bool(
            config.num_key_value_heads % tensor_parallel
            or config.num_attention_heads % tensor_parallel
            or config.intermediate_size % tensor_parallel
        ),
    }
    reasons = [reason for reason, holds in wrong.items() if holds]
    if reasons:
        raise ConfigError(f"the Megatron learner cannot have {'; '.join(reasons)}")


def _layer_spec(config: Any) -> Any:
    spec: Any = get_gpt_layer_local_spec(
        num_experts=_experts(config), qk_layernorm=_norms_heads(config), normalization="RMSNorm"
    )
    spec.submodules.self_attention.submodules.core_attention = TreeAttention
    if _experts(config):
        spec.submodules.mlp.keywords["submodules"].router = TreeRouter
    return spec


def _translate(config: Any, dtype: torch.dtype, tensor_parallel: int, expert_parallel: int) -> Any:
    experts: dict[str, Any] = {}
    if _experts(config):
        experts = {
            "num_moe_experts": _experts(config),
            "moe_router_topk": config.num_experts_per_tok,
            "moe_ffn_hidden_size": config.moe_intermediate_size,
            # Without renormalisation gates are a softmax over all experts, with it one over the chosen.
            "moe_router_pre_softmax": not config.norm_topk_prob,
            "moe_router_load_balancing_type": "none",
            "moe_token_dispatcher_type": "allgather",
        }
    return TransformerConfig(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        kv_channels=head_size(config),
        ffn_hidden_size=config.intermediate_size,
        normalization="RMSNorm",
        layernorm_epsilon=config.rms_norm_eps,
        qk_layernorm=_norms_heads(config),
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=config.model_type == "qwen2",
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        use_cpu_initialization=True,
        perform_initialization=False,
        tensor_model_parallel_size=tensor_parallel,
        expert_model_parallel_size=expert_parallel,
        expert_tensor_parallel_size=1,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        **experts,
    )


def head_size(config: Any) -> int:
    """Of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _norms_heads(config: Any) -> bool:
    return str(config.model_type).startswith("qwen3")


def _experts(config: Any) -> int | None:
    return config.num_experts if config.model_type == "qwen3_moe" else None


def _inverse_frequency(config: Any) -> Tensor:
    """float32[head / 2], as `transformers` computes it."""
    size = head_size(config)
    base = float(config.rope_parameters["rope_theta"])
    inverse: Tensor = 1.0 / (base ** (torch.arange(0, size, 2, dtype=torch.int64).float() / size))
    return inverse


def _dispatcher(gpt: Any, mlp: Any) -> TreeDispatcher:
    return TreeDispatcher(
        mlp.num_local_experts, mlp.local_expert_indices, config=gpt.config, pg_collection=gpt.pg_collection
    )
