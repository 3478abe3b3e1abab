"""Attention functions of ours in the registry of `transformers`, and what none of them computes.

Invariant: a model that asks its attention for more than causal softmax over the whole path is refused at its first
forward with a `ConfigError`, however short the path is: a window of 4,096 tokens or the best 2,048 keys change nothing
of the few tokens that a model is tried on. What a model says by a mask alone is seen where `transformers` makes masks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from kat_stream.errors import ConfigError

KNOWN = frozenset(
    {"scaling", "dropout", "is_causal", "position_ids", "use_cache", "output_attentions", "output_router_logits"}
)
"""What attention may be told: its scale, and what changes nothing here. Dropout is off, positions are in the keys."""
WINDOW = "a sliding window"
CALLED = {"sliding_window": WINDOW, "softcap": "a soft cap", "s_aux": "attention sinks"}


def register(name: str, compute: Callable[..., tuple[Tensor, None]], *own: str) -> None:
    """Make `compute` the attention `name`; `own`: the keywords that it has for itself from the model's caller."""
    known = KNOWN.union(own)

    def attention(
        module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **asked: Any
    ) -> tuple[Tensor, None]:
        odd = {CALLED.get(word, word) for word, value in asked.items() if value is not None and word not in known}
        if attention_mask is not None:
            odd.add(attention_mask if isinstance(attention_mask, str) else "a mask of its own")
        if odd:
            what = ", ".join(sorted(odd))
            raise ConfigError(f"attention of trees and of the embedded engine cannot have {what}, as this model asks")
        mine = {word: asked[word] for word in own if word in asked}
        return compute(module, query, key, value, scaling=asked.get("scaling"), **mine)

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, _mask)


def row_wide_rope(config: Any) -> str | None:
    """The type of RoPE, of all layers or of one type of layers, whose angles depend on the longest path that runs."""
    rope = getattr(config, "rope_parameters", None) or {}
    tables = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    return next((table["rope_type"] for table in tables if table.get("rope_type") in ("dynamic", "longrope")), None)


def _mask(*, local_size: int | None = None, use_vmap: bool = False, **_: Any) -> str | None:
    """Instead of a model's mask: nothing for a causal one, as our attention knows who sees whom; else what it is.

    Not refused here: some models make masks that none of their layers takes.
    """
    if local_size is not None:
        return WINDOW
    return "a mask of its own" if use_vmap else None
