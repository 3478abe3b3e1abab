"""Rows of a batch as tensors: which parts they run in, and how values of edges come back to each turn's tokens.

Invariant: every unique token runs once; values are gathered back to each turn by index (path-gather), so autograd sums
over turns and any loss on turns is exact. The row of a loss is the hidden state of the parent of its target, and an
edge (parent, target) is computed in the part of the parent, once for all turns that sampled it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kat_stream.rl.units import Units
from kat_stream.training.attention import Backend, Plan, make_plan
from kat_stream.training.gateways import Gateways
from kat_stream.training.replay import ARGUMENT
from kat_stream.trees.batch import TrainBatch
from kat_stream.trees.layout import TreeLayout, concat
from kat_stream.trees.packing import micro_batches
from kat_stream.trees.partition import Part, partition, parts_of, with_path

Wide = NDArray[np.int64]


@dataclass(frozen=True, eq=False, slots=True)
class MicroBatch:
    """Rows side by side: N unique tokens in P parts, E edges of S sampled tokens."""

    layout: TreeLayout
    parts: list[Part]
    targets: Wide
    """int64[E]: unique sampled tokens."""
    part: Wide
    """int64[E]: part of the edge's source."""
    slot: Wide
    """int64[E]: number of the edge among those of its part."""
    edge: Wide
    """int64[S] into the edges."""
    sampled: Wide
    """int64[S]: which of the batch's sampled tokens these are."""

    def edges_of(self, number: int) -> Wide:
        """int64[E_p]: the edges of a part, in the order of their slots."""
        return np.flatnonzero(self.part == number)

    def path_of(self, number: int) -> list[int]:
        """Numbers of the parts that are open above a part, outermost first."""
        start = self.parts[number].start
        return [k for k in range(number) if self.parts[k].close > start]


@dataclass(frozen=True, eq=False, slots=True)
class PartInputs:
    """What the model is given for n tokens of one part."""

    ids: Tensor
    """int64[1, n]."""
    pos: Tensor
    """int64[1, n]: depth on the path."""
    plan: Plan
    source: Tensor
    """int64[H]: unique sources of edges; only these reach the vocabulary projection."""
    edge_source: Tensor
    """int64[E_p] into `source`."""
    edge_target: Tensor
    """int64[E_p] token id."""
    routes: Tensor | None
    """uint16[n, W]: recorded experts of the tokens (`training.replay`)."""


def plan_micro_batches(batch: TrainBatch, units: Units, budget_tokens: int) -> list[list[int]]:
    """Row numbers of each micro-batch; rows that share a unit stay together."""
    atoms = joined_rows(batch, units)
    sizes = [sum(len(batch.rows[i]) for i in atom) for atom in atoms]
    return [[row for atom in group for row in atoms[atom]] for group in micro_batches(sizes, budget_tokens)]


def joined_rows(batch: TrainBatch, units: Units) -> list[list[int]]:
    """Row numbers of each set of rows that units join."""
    label = np.arange(len(batch.rows))
    row_of = np.repeat(label, [len(row.index) for row in batch.rows])
    pairs = np.unique(np.stack([units.unit, row_of], axis=1), axis=0)
    joined = np.flatnonzero(pairs[1:, 0] == pairs[:-1, 0])
    for first, second in zip(pairs[joined, 1], pairs[joined + 1, 1], strict=True):
        label[label == label[second]] = label[first]
    return [np.flatnonzero(label == k).tolist() for k in np.unique(label)]


def make_micro_batch(batch: TrainBatch, rows: list[int], budget_tokens: int) -> MicroBatch:
    """The given rows as one, in as many parts as the budget asks for."""
    layout = concat([batch.rows[i] for i in rows])
    parts = partition(layout, budget_tokens)
    targets, edge = np.unique(layout.index, return_inverse=True)
    part = parts_of(parts, layout.parent[targets])
    order = np.argsort(part, kind="stable")
    slot = np.empty(len(targets), np.int64)
    counts = np.bincount(part, minlength=len(parts))
    slot[order] = np.arange(len(targets)) - np.repeat(np.cumsum(counts) - counts, counts)
    return MicroBatch(layout, parts, targets.astype(np.int64), part, slot, edge, _sampled(batch, rows))


def part_inputs(micro: MicroBatch, number: int, backend: Backend, device: torch.device) -> PartInputs:
    """Tensors of one part."""
    layout, part = micro.layout, micro.parts[number]
    below, above = (layout, 0) if len(micro.parts) == 1 else with_path(layout, part)
    targets = micro.targets[micro.edges_of(number)]
    source, edge_source = np.unique(layout.parent[targets] - part.start, return_inverse=True)
    span = slice(part.start, part.stop)
    return PartInputs(
        ids=_wide(layout.ids[span], device)[None],
        pos=_wide(layout.pos[span], device)[None],
        plan=make_plan(below, backend, above=above, device=device),
        source=_wide(source, device),
        edge_source=_wide(edge_source, device),
        edge_target=_wide(layout.ids[targets], device),
        routes=None if layout.routes is None else torch.from_numpy(layout.routes[span]).to(device),
    )


def edge_values(model: torch.nn.Module, inputs: PartInputs, gateways: Gateways, *, entropy: bool = False) -> Tensor:
    """float[1 or 2, E_p]: log-probability of each edge's target, and the entropy at its source, with gradient."""
    replayed = {} if inputs.routes is None else {ARGUMENT: inputs.routes}
    output = model(
        input_ids=inputs.ids,
        position_ids=inputs.pos,
        logits_to_keep=inputs.source,
        use_cache=False,
        tree_plan=inputs.plan,
        tree_gateways=gateways,
        **replayed,
    )
    logits: Tensor = output.logits[0]
    total = logits.logsumexp(-1)
    logp = logits[inputs.edge_source, inputs.edge_target] - total.index_select(0, inputs.edge_source)
    if not entropy:
        return logp[None]
    spread = total - ((logits - total[:, None]).exp() * logits).sum(-1)
    return torch.stack([logp, spread.index_select(0, inputs.edge_source)])


def _sampled(batch: TrainBatch, rows: list[int]) -> Wide:
    """Positions of the rows' sampled tokens among all sampled tokens of the batch."""
    cuts = np.cumsum([0, *(len(row.index) for row in batch.rows)])
    return np.concatenate([np.arange(cuts[i], cuts[i + 1]) for i in rows])


def _wide(values: NDArray[np.integer], device: torch.device) -> Tensor:
    return torch.from_numpy(values.astype(np.int64)).to(device)
