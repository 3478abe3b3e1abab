"""Which models trees can be trained on: said when a model is loaded, for what is wrong in a step shows nowhere.

Invariant: a model that passes gives a token of a tree the logits of its path alone under the model's own attention.
What carries state from token to token beside attention (convolutions, recurrences) would carry it from one branch to
the next; a rotation that depends on the longest path would tie all paths of a row together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kat_stream.attention import row_wide_rope
from kat_stream.errors import ConfigError
from kat_stream.training.attention import NAME, make_plan
from kat_stream.trees.layout import TreeLayout

PLAIN = ("full_attention", "dense", "sparse")
"""Layer types that mix tokens by attention to the whole path or not at all."""
TOLERANCE = 0.05
"""Distance of logits over their spread: rounding, be it of an expert chosen otherwise, stays far below."""


def check_model(model: Any) -> None:
    """`ConfigError` naming what in the model keeps a path of a tree from running as it does alone."""
    reason = next(_reasons(model), None)
    if reason is not None:
        raise ConfigError(f"policy.model: {type(model).__name__} cannot be trained on trees: {reason}")


def _reasons(model: Any) -> Iterator[str]:
    config = model.config.get_text_config()
    for kind in getattr(config, "layer_types", None) or ():
        if kind not in PLAIN:
            yield f"it has layers of type {kind}"
    if model._is_stateful:
        yield "its layers carry state from token to token"
    if (kind := row_wide_rope(config)) is not None:
        yield f"RoPE of type {kind} depends on the longest path of a row"
    try:
        if not _agrees(model):
            yield "a branch of a tree has other logits than its path alone"
    except ConfigError:
        raise
    except Exception as error:  # a program of the model's author: it raises what it likes
        yield f"it does not run: {error}"


def _agrees(model: Any) -> bool:
    """Whether the second of two branches has the logits of its path alone."""
    pos = np.array([0, 1, 2, 3, 2, 3], np.int32)
    parent = np.array([-1, 0, 1, 2, 1, 4], np.int32)
    end = np.array([6, 6, 4, 4, 6, 6], np.int32)
    vocabulary = model.config.get_text_config().vocab_size
    ids = (np.arange(1, 7) * max(1, vocabulary // 7) % vocabulary).astype(np.int32)
    none = np.empty(0, np.int32)
    row = TreeLayout(ids, pos, parent, end, none, none, none)
    plan = make_plan(row, "dense", device=model.device)
    tree = _logits(model, row, np.arange(6), tree_plan=plan, logits_to_keep=torch.arange(4, 6, device=model.device))
    model.set_attn_implementation("eager")
    try:
        alone = _logits(model, row, row.path_to(5))[-2:]
    finally:
        model.set_attn_implementation(NAME)
    spread = alone - alone.mean(-1, keepdim=True)
    return tree.shape == alone.shape and bool((tree - alone).norm() <= TOLERANCE * spread.norm())


def _logits(model: Any, row: TreeLayout, chosen: Any, **more: Any) -> Tensor:
    """float32[n, vocabulary] of some tokens of the row."""
    ids, pos = (torch.from_numpy(array[chosen]).long()[None].to(model.device) for array in (row.ids, row.pos))
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, position_ids=pos, use_cache=False, **more).logits[0]
    return logits.float()
