"""Collectives with a gradient, on any device and back end.

Megatron's own put their results on the current CUDA device and want the same number of rows on every rank; trees give
each rank another number. Invariant: forward and backward make the same calls on every rank of the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def all_shards(tensor: Tensor, group: Any) -> list[Tensor]:
    """The tensor of each rank, all of one shape; no gradient."""
    if group.size() == 1:
        return [tensor]
    shards = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(shards, tensor.contiguous(), group=group)
    return shards


def row_counts(rows: Tensor, group: Any) -> list[int]:
    """How many rows each rank holds."""
    count = torch.tensor([len(rows)], device=rows.device)
    return [int(each) for each in all_shards(count, group)]


def gather_rows(rows: Tensor, group: Any, counts: Sequence[int]) -> Tensor:
    """[sum of counts, ...]: the rows of all ranks, one after the other; no gradient."""
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    return torch.cat([shard[:count] for shard, count in zip(all_shards(padded, group), counts, strict=True)])


def sum_own_rows(rows: Tensor, group: Any, counts: Sequence[int]) -> Tensor:
    """[own count, ...]: this rank's rows of the sum over ranks of [sum of counts, ...]; no gradient."""
    total = rows.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    own: Tensor = total.split(list(counts))[group.rank()]
    return own.clone()


def share_rows(rows: Tensor, group: Any, counts: Sequence[int]) -> Tensor:
    """`gather_rows`, whose gradient is the sum of what all ranks have for this rank's rows."""
    shared: Tensor = _GatherRows.apply(rows, group, counts)  # type: ignore[no-untyped-call]
    return shared


def collect_rows(rows: Tensor, group: Any, counts: Sequence[int]) -> Tensor:
    """`sum_own_rows`, whose gradient is gathered from all ranks."""
    own: Tensor = _SumRows.apply(rows, group, counts)  # type: ignore[no-untyped-call]
    return own


def share_columns(columns: Tensor, group: Any) -> Tensor:
    """[..., C * ranks] of [..., C] a rank. All ranks compute the same from it: a rank's gradient is its columns'."""
    shared: Tensor = _GatherColumns.apply(columns, group)  # type: ignore[no-untyped-call]
    return shared


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Any, counts: Sequence[int]) -> Tensor:
        ctx.group, ctx.counts = group, counts
        return gather_rows(rows, group, counts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return sum_own_rows(gradients[0], ctx.group, ctx.counts), None, None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Any, counts: Sequence[int]) -> Tensor:
        ctx.group, ctx.counts = group, counts
        return sum_own_rows(rows, group, counts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gather_rows(gradients[0], ctx.group, ctx.counts), None, None


class _GatherColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, columns: Tensor, group: Any) -> Tensor:
        ctx.group, ctx.width = group, columns.shape[-1]
        return torch.cat(all_shards(columns, group), dim=-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        own: Tensor = gradients[0].split(ctx.width, dim=-1)[ctx.group.rank()]
        return own.contiguous(), None
