"""Tree attention on an accelerator's kernels: FlexAttention (the tree mask as a function) and flash-attn varlen.

Invariant: both are fed from the same layout as the reference back ends. Varlen has one sequence per unbranched run: its
queries are the run, its keys the gathered path that ends with it, causal from the bottom right, so pairs are exact.
FlexAttention has no backward on the CPU and flash-attn no CPU at all: asking for them there is a `ConfigError`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from kat_stream.errors import ConfigError
from kat_stream.trees.layout import TreeLayout
from kat_stream.trees.segments import run_paths


@dataclass(frozen=True, eq=False, slots=True)
class FlexPlan:
    mask: BlockMask

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """[1, H, n, D] queries, [1, H_kv, K, D] keys -> [1, n, H, D]."""
        if query.device.type == "cpu" and torch.is_grad_enabled():
            raise ConfigError("attention flex has no backward on the CPU; use segments")
        out: Tensor = _flex(query.device.type)(
            query, key, value, block_mask=self.mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
        return out.transpose(1, 2).contiguous()


@dataclass(frozen=True, eq=False, slots=True)
class VarlenPlan:
    """R runs; queries are in the order of the row, so only keys are gathered."""

    key: Tensor
    """int64[sum of path lengths]: row index of each key, run after run."""
    query_cuts: Tensor
    """int32[R + 1]: where each run's queries start."""
    key_cuts: Tensor
    """int32[R + 1]."""
    longest_query: int
    longest_key: int

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """[1, H, n, D] queries, [1, H_kv, K, D] keys -> [1, n, H, D]."""
        q = query[0].transpose(0, 1).bfloat16()  # flash-attn has no wider types
        k, v = (x[0].transpose(0, 1).index_select(0, self.key).bfloat16() for x in (key, value))
        out: Tensor = _flash()(
            q, k, v, self.query_cuts, self.key_cuts, self.longest_query, self.longest_key,
            softmax_scale=scaling, causal=True,
        )  # fmt: skip
        return out[None].to(query.dtype)


def flex_plan(row: TreeLayout, above: int, device: torch.device | None) -> FlexPlan:
    """The mask of the row's tokens from `above` on."""
    end = torch.from_numpy(row.end).to(device)

    def visible(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q + above) & (q + above < end[k])

    where = str(device or "cpu")
    return FlexPlan(create_block_mask(visible, None, None, len(row) - above, len(row), device=where))


def varlen_plan(row: TreeLayout, above: int, device: torch.device | None) -> VarlenPlan:
    """Runs of the row's tokens from `above` on, each with its path."""
    starts, stops, paths = run_paths(row, above)
    keys = torch.cat([torch.from_numpy(path) for path in paths])
    queries, lengths = torch.from_numpy(stops - starts), torch.tensor([len(path) for path in paths])
    return VarlenPlan(
        keys.to(device), _cuts(queries, device), _cuts(lengths, device), int(queries.max()), int(lengths.max())
    )


def _cuts(lengths: Tensor, device: torch.device | None) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32).to(device)


@cache
def _flex(device: str) -> Callable[..., Any]:
    eager: Callable[..., Any] = flex_attention
    return eager if device == "cpu" else torch.compile(eager, dynamic=True)


@cache
def _flash() -> Callable[..., Any]:
    try:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise ConfigError(f"attention flash needs the extra `flash` ({error})") from error
    found: Callable[..., Any] = flash_attn_varlen_func
    return found
