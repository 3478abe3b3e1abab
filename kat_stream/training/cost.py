"""Which attention back end a row gets: the cheapest of a cost model whose coefficients are measured once a device.

    seconds of one layer, forward = call_s * calls + pair_s * pairs + key_s * rows gathered or merged

Invariant: the choice is a speed, never a result: all back ends compute the same attention.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch.nn.functional import scaled_dot_product_attention

from kat_stream.trees.layout import TreeLayout
from kat_stream.trees.segments import cut_segments
from kat_stream.trees.slices import cut_slices

log = logging.getLogger(__name__)
HEADS, HEAD_SIZE = 8, 64
"""Of the measurement; only the ratio of the coefficients matters."""
Choice = Literal["segments", "padded", "dense"]


@dataclass(frozen=True, slots=True)
class CostModel:
    call_s: float
    pair_s: float
    key_s: float
    device: str

    def seconds(self, row: TreeLayout, above: int, backend: Choice) -> float:
        """Predicted for one layer of the row's tokens from `above` on, forward."""
        if backend == "dense":
            return self.call_s + self.pair_s * (len(row) - above) * len(row)
        if backend == "segments" and self.device == "cpu":
            slices = cut_slices(row, above)
            merged = sum(stop - start for (start, stop), _ in slices.branches)
            calls = len(slices.runs) + len(slices.branches)
            return self.call_s * calls + self.pair_s * slices.pairs + self.key_s * merged
        segments = cut_segments(row, above)
        keys = sum(bucket.key.size for bucket in segments.buckets)
        return self.call_s * len(segments.buckets) + self.pair_s * segments.pairs + self.key_s * keys

    def choose(self, row: TreeLayout, above: int) -> Choice:
        """The cheapest back end; its reasons go to the log at level debug."""
        costs: dict[Choice, float] = {name: self.seconds(row, above, name) for name in ("segments", "padded", "dense")}
        best = min(costs, key=costs.__getitem__)
        said = ", ".join(f"{name} {cost * 1e3:.3f} ms" for name, cost in costs.items())
        log.debug("attention: %s for %d tokens below %d (a layer: %s)", best, len(row) - above, above, said)
        return best

    def __str__(self) -> str:
        return (
            f"attention on {self.device}: {self.call_s * 1e6:.1f} us a call, {self.pair_s * 1e9:.2f} ns a pair, "
            f"{self.key_s * 1e9:.1f} ns a row gathered or merged"
        )


@cache
def measured(device: torch.device) -> CostModel:
    """Coefficients of this device, from a few milliseconds of work; said once in the log."""
    small, large = _attention(8, 16, device), _attention(256, 512, device)
    pair = max((large - small) / (256 * 512 - 8 * 16), 1e-13)
    rows = torch.zeros(2048, HEADS * HEAD_SIZE, device=device)
    index = torch.arange(2047, -1, -1, device=device)
    gather = 2 * _best(lambda: rows.index_select(0, index), device) / len(index)
    model = CostModel(max(small - pair * 128, 1e-9), pair, gather, str(device))
    log.info("%s", model)
    return model


def _attention(queries: int, keys: int, device: torch.device) -> float:
    q = torch.zeros(1, HEADS, queries, HEAD_SIZE, device=device)
    k = torch.zeros(1, HEADS, keys, HEAD_SIZE, device=device)
    mask = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device)
    return _best(lambda: scaled_dot_product_attention(q, k, k, attn_mask=mask), device)


def _best(work: Callable[[], object], device: torch.device, tries: int = 5) -> float:
    """Seconds of the fastest try."""
    found = []
    for _ in range(tries):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - began)
    return min(found)
