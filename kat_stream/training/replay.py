"""Routing replay (R3, arXiv 2510.11370): the learner sends each token to the experts that the engine chose for it.

Owns the hooks on the model's routers. Invariant: a token with a recorded row goes to exactly those experts, in every
layer; its gate weights are the learner's own router probabilities at them, so the router still learns. A token without
a row routes itself. A model that is not given rows (a reference, a teacher) is not changed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kat_stream.errors import ConfigError
from kat_stream.moe import routing_of
from kat_stream.trees.layout import MISSING

ARGUMENT = "tree_routes"
"""Keyword of the model's forward: uint16[n, W], rows of the n tokens that run."""


class RoutingReplay:
    """Installed on one model. `ConfigError` if its routers weigh experts in a way that is not computed here."""

    def __init__(self, model: nn.Module) -> None:
        self.routing = routing_of(model)
        self.decisions = self.known = self.agreed = 0
        self._rows: Tensor | None = None
        for router in self.routing.routers.values():
            _check(router)
        model.register_forward_pre_hook(self._begin, with_kwargs=True)
        model.register_forward_hook(self._end, always_call=True)
        for layer, router in self.routing.routers.items():
            router.register_forward_hook(self._at(layer))

    @property
    def shape(self) -> tuple[int, int]:
        """Width of a token's row, and number of experts."""
        return self.routing.width, self.routing.experts

    def take(self) -> dict[str, int]:
        """Decisions since the last call: all, replayed, and replayed ones that the learner would have made itself."""
        counts = {
            "routing_decisions": self.decisions,
            "routing_known": self.known,
            "routing_agreed": self.agreed,
        }
        self.decisions = self.known = self.agreed = 0
        return counts

    def _begin(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self._rows = kwargs.pop(ARGUMENT, None)
        return args, kwargs

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        self._rows = None

    def _at(self, layer: int) -> Any:
        columns = slice(layer * self.routing.top_k, (layer + 1) * self.routing.top_k)

        def hook(router: nn.Module, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> Any:
            logits, _, own = output
            counts = torch.is_grad_enabled()  # other forwards only look
            self.decisions += counts * len(own)
            if self._rows is None:
                return None
            recorded = self._rows[:, columns].to(torch.int64)
            known = recorded[:, :1] != int(MISSING)
            chosen = torch.where(known, recorded, own)
            if counts:
                same = (own.sort(-1).values == chosen.sort(-1).values).all(-1)
                self.known += int(known.sum())
                self.agreed += int((same & known[:, 0]).sum())
            return logits, gates(router, logits, chosen), chosen

        return hook


def gates(router: nn.Module, logits: Tensor, chosen: Tensor) -> Tensor:
    """float[n, k]: weights of the experts int64[n, k] by the router's logits float[n, experts], with gradient."""
    probabilities = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    picked = probabilities.gather(1, chosen)
    if getattr(router, "norm_topk_prob", True):
        picked = picked / picked.sum(-1, keepdim=True)
    return picked.to(logits.dtype)


def _check(router: nn.Module) -> None:
    """The formula above on the router's own choice must be the router's own answer."""
    weight: Any = router.weight
    unknown = f"routing replay does not know how {type(router).__name__} weighs its experts"
    with torch.no_grad():
        probe = torch.linspace(-1, 1, 3 * weight.shape[1]).view(3, -1).to(weight)
        try:
            logits, scores, chosen = router(probe)
        except TypeError as error:  # it wants more than hidden states
            raise ConfigError(f"{unknown}: {error}") from error
    if not torch.allclose(gates(router, logits, chosen), scores, atol=1e-3):
        raise ConfigError(unknown)
