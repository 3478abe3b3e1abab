"""Tree attention for any Hugging Face causal model, through the attention registry of `transformers`.

Invariant: a token attends to its ancestors and itself, nothing else; with position ids = path depths the result equals
running each path alone. Two plans of the same attention: `DensePlan`, an N x N mask (the reference), and `SegmentPlan`,
unbranched runs against their own path (the fast one: it computes about as many pairs as the paths have).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from kat_stream.errors import ConfigError
from kat_stream.trees.layout import TreeLayout
from kat_stream.trees.segments import cut_segments

NAME = "kat_tree"
Backend = Literal["segments", "dense"]


@dataclass(frozen=True, eq=False, slots=True)
class DensePlan:
    mask: Tensor
    """bool[1, 1, N, N]: query row sees key column."""


@dataclass(frozen=True, eq=False, slots=True)
class _Block:
    query: Tensor
    """int64[B * Q]."""
    key: Tensor
    """int64[B * K]."""
    mask: Tensor
    """bool[B, 1, Q, K]."""


@dataclass(frozen=True, eq=False, slots=True)
class SegmentPlan:
    blocks: tuple[_Block, ...]
    place: Tensor
    """int64[N] into the outputs of all blocks."""


Plan = DensePlan | SegmentPlan


def make_plan(row: TreeLayout, backend: Backend) -> Plan:
    """How a row will attend; made once a row and used by every layer."""
    if backend == "dense":
        at = torch.arange(len(row))
        end = torch.from_numpy(row.end)
        return DensePlan(((at <= at[:, None]) & (at[:, None] < end))[None, None])
    segments = cut_segments(row)
    blocks = []
    for bucket in segments.buckets:
        depth = torch.from_numpy(bucket.depth)
        mask = torch.arange(bucket.key.shape[1]) <= depth[:, :, None]
        query, key = torch.from_numpy(bucket.query), torch.from_numpy(bucket.key)
        blocks.append(_Block(query.flatten(), key.flatten(), mask[:, None]))
    return SegmentPlan(tuple(blocks), torch.from_numpy(segments.place))


def tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    tree_plan: Plan | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The function that `transformers` calls: [1, H, N, D] queries, [1, H_kv, N, D] keys -> ([1, N, H, D], None)."""
    if tree_plan is None:
        raise ConfigError("tree attention got no tree_plan: this model passes no keyword arguments to its attention")
    if sliding_window is not None or softcap is not None:
        raise ConfigError("tree attention has no sliding window and no soft cap, which this model asks for")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if isinstance(tree_plan, DensePlan):
        out = scaled_dot_product_attention(query, key, value, attn_mask=tree_plan.mask, scale=scaling)
        return out.transpose(1, 2).contiguous(), None
    return _by_segments(query, key, value, tree_plan, scaling)[None], None


def _by_segments(query: Tensor, key: Tensor, value: Tensor, plan: SegmentPlan, scaling: float | None) -> Tensor:
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


AttentionInterface.register(NAME, tree_attention)
