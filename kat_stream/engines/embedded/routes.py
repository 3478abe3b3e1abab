"""Which experts the model routed each token to, as a forward runs (SGLang's `return_routed_experts`).

Owns the decisions of the step that just ran. Invariant: they are those that the forward used, taken from the routers'
own output; reading the model changes nothing of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from kat_stream.moe import routing_of

Routes = NDArray[np.uint16]


class Recorder:
    """Listens to the routers of a model that runs eagerly."""

    def __init__(self, model: nn.Module) -> None:
        self.routing = routing_of(model)
        self._chosen: dict[int, Tensor] = {}
        for layer, router in self.routing.routers.items():
            router.register_forward_hook(self._listen(layer))

    def take(self, tokens: int) -> Routes:
        """uint16[tokens, layers * top_k] of the last step."""
        rows = np.zeros((tokens, self.routing.layers, self.routing.top_k), np.uint16)
        for layer, chosen in self._chosen.items():
            rows[:, layer] = chosen.numpy()
        self._chosen.clear()
        return rows.reshape(tokens, -1)

    def _listen(self, layer: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            self._chosen[layer] = output[2]

        return hook
