"""Tree attention on a CPU without masks and gathers: causal squares of runs, and rectangles below forks, merged.

Each square and rectangle is one call of the flash kernel that `scaled_dot_product_attention` itself takes on a CPU;
outputs of a query's keys in several of them are merged by their log-sum-exps. Backward, every call is given the merged
output and log-sum-exp, which makes its gradients those of the whole softmax: nothing is recomputed and no weight of the
merge is differentiated.
Invariant: pairs computed are the visible ones, as many as each path alone under `is_causal` would have had to itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kat_stream.trees.slices import Slices, Span

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, eq=False, slots=True)
class SlicePlan:
    slices: Slices

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """[1, H, n, D] queries, [1, H_kv, K, D] keys -> [1, n, H, D]; query i is token K - n + i."""
        grouped = query[0].unflatten(0, (key.shape[1], -1))
        wide = key[0, :, None], value[0, :, None]
        out: Tensor = _Merged.apply(grouped, *wide, self.slices, scaling)  # type: ignore[no-untyped-call]
        return out.flatten(1, 2)[None]


class _Merged(torch.autograd.Function):
    """Groups G of query heads that share keys: [G, H/G, n, D] and [G, 1, K, D] -> [n, G, H/G, D]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, slices: Slices, scaling: float | None) -> Tensor:
        wide = [x.expand(-1, query.shape[1], -1, -1) for x in (key, value)]
        above = key.shape[2] - query.shape[2]
        out = query.new_empty(query.permute(2, 0, 1, 3).shape).permute(1, 2, 0, 3)
        total = out.new_empty((query.shape[2], *query.shape[:2])).permute(1, 2, 0)
        for start, stop in slices.runs:
            part = _at(query, (start, stop)), *(_at(x, (start + above, stop + above)) for x in wide)
            own, size = _forward(*part, is_causal=True, scale=scaling)
            out[:, :, start:stop], total[:, :, start:stop] = own, size
        for rows, columns in slices.branches:
            more, size = _forward(_at(query, rows), *(_at(x, columns) for x in wide), scale=scaling)
            known = total[:, :, slice(*rows)]
            _at(out, rows).lerp_(more, torch.sigmoid(size - known)[..., None])
            total[:, :, slice(*rows)] = torch.logaddexp(known, size)
        ctx.save_for_backward(query, key, value, out, total)
        ctx.slices, ctx.scaling = slices, scaling
        return out.permute(2, 0, 1, 3)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, total = ctx.saved_tensors
        grad = gradients[0].permute(1, 2, 0, 3)
        grad_q = torch.empty_like(query)
        grad_k, grad_v = torch.zeros_like(key), torch.zeros_like(value)
        above = key.shape[2] - query.shape[2]

        def part(rows: Span, columns: Span, causal: bool) -> Tensor:
            q, o, g = (_at(x, rows) for x in (query, out, grad))
            k, v = (_at(x, columns).expand(-1, query.shape[1], -1, -1) for x in (key, value))
            found = _backward(g, q, k, v, o, total[:, :, slice(*rows)], 0.0, causal, scale=ctx.scaling)
            for into, more in zip((grad_k, grad_v), found[1:], strict=True):
                _at(into, columns).add_(more if more.shape[1] == 1 else more.sum(1, keepdim=True))
            own: Tensor = found[0]
            return own

        for start, stop in ctx.slices.runs:
            grad_q[:, :, start:stop] = part((start, stop), (start + above, stop + above), True)
        for rows, columns in ctx.slices.branches:
            _at(grad_q, rows).add_(part(rows, columns, False))
        return grad_q, grad_k, grad_v, None, None


def _at(x: Tensor, span: Span) -> Tensor:
    """Tokens of a span: [.., .., N, D] -> [.., .., stop - start, D], a view."""
    return x[:, :, span[0] : span[1]]
