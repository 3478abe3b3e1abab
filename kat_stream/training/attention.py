"""Tree attention for any Hugging Face causal model, through the attention registry of `transformers`.

Invariant: a token attends to its ancestors and itself, nothing else; with position ids = path depths the result equals
running each path alone. Plans of the same attention: `DensePlan`, an N x N mask (the reference), `SlicePlan`, squares
and rectangles without any mask (CPU), `PaddedPlan`, unbranched runs against their gathered paths in padded buckets, and
those of `varlen` for accelerators.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from kat_stream.attention import register
from kat_stream.errors import ConfigError
from kat_stream.training.cost import measured
from kat_stream.training.gateways import Gateways
from kat_stream.training.slices import SlicePlan
from kat_stream.training.varlen import FlexPlan, VarlenPlan, flex_plan, varlen_plan
from kat_stream.trees.layout import TreeLayout
from kat_stream.trees.segments import cut_segments
from kat_stream.trees.slices import cut_slices

NAME = "kat_tree"
Backend = Literal["auto", "segments", "padded", "dense", "flex", "flash"]
"""`segments`: SlicePlan on a CPU, PaddedPlan elsewhere."""


@dataclass(frozen=True, eq=False, slots=True)
class DensePlan:
    mask: Tensor
    """bool[1, 1, N, K]: query row sees key column."""


@dataclass(frozen=True, eq=False, slots=True)
class _Block:
    query: Tensor
    """int64[B * Q]."""
    key: Tensor
    """int64[B * K]."""
    mask: Tensor
    """bool[B, 1, Q, K]."""


@dataclass(frozen=True, eq=False, slots=True)
class PaddedPlan:
    blocks: tuple[_Block, ...]
    place: Tensor
    """int64[N] into the outputs of all blocks."""


Plan = DensePlan | SlicePlan | PaddedPlan | FlexPlan | VarlenPlan


def make_plan(row: TreeLayout, backend: Backend, *, above: int = 0, device: torch.device | None = None) -> Plan:
    """How the tokens of a row will attend; made once a row and used by every layer.

    The first `above` tokens of the row are a path that only gives keys.
    """
    if backend == "auto":
        backend = measured(device or torch.device("cpu")).choose(row, above)
    if backend == "flex":
        return flex_plan(row, above, device)
    if backend == "flash":
        return varlen_plan(row, above, device)
    if backend == "dense":
        at = torch.arange(len(row), device=device)
        end = torch.from_numpy(row.end).to(device)
        query = at[above:, None]
        return DensePlan(((at <= query) & (query < end))[None, None])
    if backend == "segments" and (device is None or device.type == "cpu"):
        return SlicePlan(cut_slices(row, above))
    segments = cut_segments(row, above)
    blocks = []
    for bucket in segments.buckets:
        depth, query, key = (torch.from_numpy(x).to(device) for x in (bucket.depth, bucket.query, bucket.key))
        mask = torch.arange(key.shape[1], device=device) <= depth[:, :, None]
        blocks.append(_Block(query.flatten(), key.flatten(), mask[:, None]))
    return PaddedPlan(tuple(blocks), torch.from_numpy(segments.place).to(device))


def tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    tree_plan: Plan | None = None,
    tree_gateways: Gateways | None = None,
    scaling: float | None = None,
) -> tuple[Tensor, None]:
    """What `transformers` calls: [1, H, N, D] queries, [1, H_kv, N, D] keys, [1, H_kv, N, V] values -> ([1, N, H, V],
    None)."""
    if tree_plan is None:
        raise ConfigError("tree attention got no tree_plan: this model passes no keyword arguments to its attention")
    if tree_gateways is not None:
        key, value = tree_gateways.through(key, value)
    wanted = value.shape[3]
    if wanted != query.shape[3]:  # latent attention; kernels take heads of one size
        scaling = query.shape[3] ** -0.5 if scaling is None else scaling
        query, key, value = (pad(x, (0, max(query.shape[3], wanted) - x.shape[3])) for x in (query, key, value))
    return _attend(query, key, value, tree_plan, scaling)[..., :wanted], None


def _attend(query: Tensor, key: Tensor, value: Tensor, plan: Plan, scaling: float | None) -> Tensor:
    if isinstance(plan, SlicePlan | FlexPlan | VarlenPlan):
        return plan.attend(query, key, value, scaling)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if isinstance(plan, DensePlan):
        out = scaled_dot_product_attention(query, key, value, attn_mask=plan.mask, scale=scaling)
        return out.transpose(1, 2).contiguous()
    return _padded(query, key, value, plan, scaling)[None]


def _padded(query: Tensor, key: Tensor, value: Tensor, plan: PaddedPlan, scaling: float | None) -> Tensor:
    heads, size = query.shape[1], query.shape[3]
    flat_q, flat_k, flat_v = (x[0].transpose(0, 1).flatten(1) for x in (query, key, value))
    outputs = []
    for block in plan.blocks:
        count = block.mask.shape[0]
        q, k, v = (
            x.index_select(0, index).view(count, -1, heads, size).transpose(1, 2)
            for x, index in ((flat_q, block.query), (flat_k, block.key), (flat_v, block.key))
        )
        out = scaled_dot_product_attention(q, k, v, attn_mask=block.mask, scale=scaling)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, plan.place)


register(NAME, tree_attention, "tree_plan", "tree_gateways")
