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
from numpy.typing import NDArray
from torch import Tensor

from kat_stream.attention import row_wide_rope
from kat_stream.errors import ConfigError
from kat_stream.training.attention import NAME, make_plan
from kat_stream.trees.layout import TreeLayout

PLAIN = ("full_attention", "dense", "sparse")
"""Layer types that mix tokens by attention to the whole path or not at all."""
TOLERANCE = 1e-4
"""Distance of logits over their spread: rounding stays below 1e-5, wrong positions of mild models are above 2e-4."""
TRIES = 3
"""Rows, of which one must agree: in a mixture of experts, rounding may choose another expert for one of them."""


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
        if not any(_agrees(model, number) for number in range(TRIES)):
            yield "a branch of a tree has other logits than its path alone"
    except ConfigError:
        raise
    except Exception as error:  # a program of the model's author: it raises what it likes
        yield f"it does not run: {error}"


def _agrees(model: Any, first: int) -> bool:
    """Whether the second of two branches has the logits of its path alone; `first` chooses the ids."""
    pos = np.array([0, 1, 2, 3, 2, 3], np.int32)
    parent = np.array([-1, 0, 1, 2, 1, 4], np.int32)
    end = np.array([6, 6, 4, 4, 6, 6], np.int32)
    vocabulary = model.config.get_text_config().vocab_size
    ids = (np.arange(first + 1, first + 7) * max(1, vocabulary // 7) % vocabulary).astype(np.int32)
    none = np.empty(0, np.int32)
    row = TreeLayout(ids, pos, parent, end, none, none, none)
    plan = make_plan(row, "dense", device=model.device)
    last = torch.arange(4, 6, device=model.device)
    tree = _logits(model, ids, position_ids=_tensor(model, pos), tree_plan=plan, logits_to_keep=last)
    model.set_attn_implementation("eager")
    try:
        alone = _logits(model, ids[row.path_to(5)])[-2:]
    finally:
        model.set_attn_implementation(NAME)
    spread = alone - alone.mean(-1, keepdim=True)
    return tree.shape == alone.shape and bool((tree - alone).norm() <= TOLERANCE * spread.norm())


def _logits(model: Any, ids: NDArray[np.int32], **more: Any) -> Tensor:
    """float32[n, vocabulary]; without `position_ids` the model numbers positions as it does by itself."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=_tensor(model, ids), use_cache=False, **more).logits[0]
    return logits.float()


def _tensor(model: Any, values: NDArray[np.int32]) -> Tensor:
    return torch.from_numpy(values).long()[None].to(model.device)
