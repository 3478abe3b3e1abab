"""Rows of a batch as tensors of one micro-batch, and the log-probs of its sampled tokens.

Invariant: every unique token runs once; log-probs are gathered back to each turn by index (path-gather), so autograd
sums over turns and any loss on turns is exact. The row of a loss is the hidden state of the parent of its target.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kat_stream.rl.turn_ratio import LossInputs
from kat_stream.rl.units import Units
from kat_stream.training.attention import Backend, Plan, make_plan
from kat_stream.trees.batch import TrainBatch
from kat_stream.trees.layout import concat
from kat_stream.trees.packing import micro_batches


@dataclass(frozen=True, eq=False, slots=True)
class MicroBatch:
    """N unique tokens, E of them targets of S sampled tokens (a token that several turns sampled is one target)."""

    ids: Tensor
    """int64[1, N]."""
    pos: Tensor
    """int64[1, N]: depth on the path."""
    plan: Plan
    source: Tensor
    """int64[H]: unique parents of targets; only these reach the vocabulary projection."""
    edge_source: Tensor
    """int64[E] into `source`."""
    edge_target: Tensor
    """int64[E] token id."""
    edge: Tensor
    """int64[S] into the edges."""
    sampled: NDArray[np.int64]
    """int64[S]: which of the batch's sampled tokens these are."""


def plan_micro_batches(batch: TrainBatch, units: Units, budget_tokens: int) -> list[list[int]]:
    """Row numbers of each micro-batch; rows that share a unit stay together."""
    owner = _owners(batch, units)
    atoms = [np.flatnonzero(owner == k).tolist() for k in range(int(owner.max(initial=-1)) + 1)]
    sizes = [sum(len(batch.rows[i]) for i in atom) for atom in atoms]
    return [[row for atom in group for row in atoms[atom]] for group in micro_batches(sizes, budget_tokens)]


def _owners(batch: TrainBatch, units: Units) -> NDArray[np.int64]:
    """int64[rows]: number of the connected set (rows joined by units) that each row belongs to."""
    label = np.arange(len(batch.rows))
    row_of = np.repeat(label, [len(row.index) for row in batch.rows])
    pairs = np.unique(np.stack([units.unit, row_of], axis=1), axis=0)
    joined = np.flatnonzero(pairs[1:, 0] == pairs[:-1, 0])
    for first, second in zip(pairs[joined, 1], pairs[joined + 1, 1], strict=True):
        label[label == label[second]] = label[first]
    return np.unique(label, return_inverse=True)[1]


def make_micro_batch(batch: TrainBatch, rows: list[int], backend: Backend) -> MicroBatch:
    """Tensors of the given rows, as one row."""
    row = concat([batch.rows[i] for i in rows])
    targets, edge = np.unique(row.index, return_inverse=True)
    source, edge_source = np.unique(row.parent[targets], return_inverse=True)
    return MicroBatch(
        ids=_wide(row.ids)[None],
        pos=_wide(row.pos)[None],
        plan=make_plan(row, backend),
        source=_wide(source),
        edge_source=_wide(edge_source),
        edge_target=_wide(row.ids[targets]),
        edge=_wide(edge),
        sampled=_sampled(batch, rows),
    )


def loss_inputs(batch: TrainBatch, units: Units, micro: MicroBatch, logp: Tensor) -> LossInputs:
    """The units of this micro-batch, whole, around its log-probs float[S]."""
    unit, local = np.unique(units.unit[micro.sampled], return_inverse=True)
    return LossInputs(
        logp=logp,
        rollout_logp=torch.from_numpy(batch.logprobs[micro.sampled]).to(logp.dtype),
        unit=_wide(local),
        length=torch.from_numpy(units.length[unit]).to(logp.dtype),
        advantage=torch.from_numpy(units.advantage[unit]).to(logp.dtype),
        weight=torch.from_numpy(units.weight[unit]).to(logp.dtype),
    )


def _sampled(batch: TrainBatch, rows: list[int]) -> NDArray[np.int64]:
    """Positions of the rows' sampled tokens among all sampled tokens of the batch."""
    cuts = np.cumsum([0, *(len(row.index) for row in batch.rows)])
    return np.concatenate([np.arange(cuts[i], cuts[i + 1]) for i in rows])


def _wide(values: NDArray[np.integer]) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))


def turn_logprobs(model: torch.nn.Module, micro: MicroBatch) -> Tensor:
    """float[S]: log-probability of each turn's sampled tokens under the model, with gradient."""
    output = model(
        input_ids=micro.ids,
        position_ids=micro.pos,
        logits_to_keep=micro.source,
        use_cache=False,
        tree_plan=micro.plan,
    )
    logits: Tensor = output.logits[0]
    chosen = logits[micro.edge_source, micro.edge_target]
    edges = chosen - logits.logsumexp(-1).index_select(0, micro.edge_source)
    return edges.index_select(0, micro.edge)
