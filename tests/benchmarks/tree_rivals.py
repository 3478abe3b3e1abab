"""What tree training is measured against, on the same model, loss, backward pass and budget.

`packed` is the baseline: each path (one that is a prefix of another is merged into it) an own sequence, several in a
micro-batch, each its own causal attention call without any mask. `padded` is a trie as AReaL packs it: whole paths as
large as the budget allows, filled up to the budget, under an N x N mask. `split` is the same without filling and mask:
trees of whole paths within the budget, so that a prefix is computed once a tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from kat_stream.trees import TrainBatch, TreeLayout, TurnTokens, build_forest, concat, make_batch, merge
from kat_stream.trees.batch import OPTIONAL

CAUSAL = "bench_causal"


def as_batch(turns: Sequence[TurnTokens], advantages: Sequence[float], budget: int) -> TrainBatch:
    ones = np.ones(len(turns))
    names = [turn.turn_id for turn in turns]
    return make_batch(
        turns, rollout=np.arange(len(turns)), advantage=advantages, weight=ones, rollout_ids=names, budget_tokens=budget
    )


def apart(batch: TrainBatch) -> TrainBatch:
    """The same turns on a row for each leaf path; a turn on several paths is learned on the first."""
    cuts = np.cumsum([0, *batch.lengths])
    rows, turns = [], []
    for row in batch.rows:
        stops = np.cumsum(row.lengths)
        ends = row.index[stops - 1]
        leaves = np.flatnonzero(row.end == np.arange(1, len(row) + 1))
        owner = leaves[np.searchsorted(leaves, ends)]
        for leaf in np.unique(owner):
            mine = np.flatnonzero(owner == leaf)
            index = np.concatenate([row.index[stops[k] - row.lengths[k] : stops[k]] for k in mine])
            path = np.flatnonzero(row.end[: leaf + 1] > leaf)
            at = np.arange(len(path), dtype=np.int32)
            first = len(turns)
            turns.extend(row.turns[mine].tolist())
            numbers = np.arange(first, len(turns), dtype=np.int32)
            whole = np.full_like(at, len(path))
            rows.append(TreeLayout(row.ids[path], at, at - 1, whole, numbers, row.lengths[mine], row.pos[index]))
    tokens = np.concatenate([np.arange(cuts[turn], cuts[turn + 1]) for turn in turns])
    given = {name: getattr(batch, name) for name in OPTIONAL}
    return replace(
        batch,
        rows=tuple(rows),
        logprobs=batch.logprobs[tokens],
        advantage=batch.advantage[turns],
        weight=batch.weight[turns],
        rollout=batch.rollout[turns],
        **{name: None if array is None else array[tokens] for name, array in given.items()},
    )


def in_groups(turns: Sequence[TurnTokens], advantages: Sequence[float], budget: int) -> TrainBatch:
    """Rows of consecutive paths, as many together as fit into the budget as one tree."""
    order = sorted(range(len(turns)), key=lambda i: _path(turns[i]))
    groups: list[list[int]] = []
    for number in order:
        together = [*(groups[-1] if groups else []), number]
        if groups and sum(len(tree) for tree in build_forest([turns[i] for i in together])) <= budget:
            groups[-1] = together
        else:
            groups.append([number])
    return merge([as_batch([turns[i] for i in g], [advantages[i] for i in g], budget) for g in groups])


def _path(turn: TurnTokens) -> bytes:
    return np.concatenate([turn.prompt_ids, turn.sampled_ids]).astype(">i4").tobytes()


def filled(batch: TrainBatch, budget: int) -> TrainBatch:
    """Every row with a chain of tokens that nobody learns from, up to the budget."""
    return replace(batch, rows=tuple(concat([row, _chain(budget - len(row))]) for row in batch.rows))


def _chain(size: int) -> TreeLayout:
    at, none = np.arange(max(size, 0), dtype=np.int32), np.empty(0, np.int32)
    return TreeLayout(np.zeros_like(at), at, at - 1, np.full_like(at, len(at)), none, none, none)


def causal(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, *, tree_plan: Any, **_: Any
) -> tuple[Tensor, None]:
    """Attention of a row of separate sequences: one plain causal call each."""
    sizes = [stop - start for start, stop in tree_plan.slices.runs]
    pieces = zip(*(x.split(sizes, 2) for x in (query, key, value)), strict=True)
    out = torch.cat([scaled_dot_product_attention(q, k, v, is_causal=True) for q, k, v in pieces], dim=2)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(CAUSAL, causal)
