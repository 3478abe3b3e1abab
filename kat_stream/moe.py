"""The routers of a mixture of experts in `transformers`: where they are, and the shape of what they decide.

Invariant: a router is a module that returns (logits, gate weights, expert numbers), each [tokens, ...]; its layer is
the number in its name. So an engine can record, and a learner replay, without model code of our own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from kat_stream.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Routing:
    """The routers by hidden layer; a recorded row of a token is uint16[layers * top_k], 0 in layers without experts."""

    routers: dict[int, nn.Module]
    layers: int
    top_k: int
    experts: int

    @property
    def width(self) -> int:
        return self.layers * self.top_k


def routing_of(model: nn.Module) -> Routing:
    """`ConfigError` if the model has no routers that return their decisions."""
    found = {
        int(layer.group(1)): module
        for name, module in model.named_modules()
        if type(module).__name__.endswith("TopKRouter") and (layer := re.search(r"layers\.(\d+)\.", name))
    }
    if not found:
        raise ConfigError(f"{type(model).__name__} has no routers of experts whose decisions could be recorded")
    first = next(iter(found.values()))
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    return Routing(found, int(config.num_hidden_layers), int(first.top_k), int(first.num_experts))
