"""A row in parts, one after the other, with gradients as if it had run at once.

What a part needs of the path above it passes through gateways: per layer keys and values, and the values (log-probs,
entropies) of the path's edges that a turn crossing the cut still needs. Each is a leaf below and a root above: what
the parts below leave in its gradient is relayed when the part above runs backward.
An edge belongs to the part of its source, so a cut token's children are predicted where its hidden state is: the hidden
state itself never crosses a cut, and no token and no vocabulary row is computed twice.
Invariant: graphs that are alive are those of one path of parts and the running one; a part runs backward exactly once,
after all that hangs from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kat_stream.trees.partition import Part

Pair = tuple[Tensor, Tensor]


@dataclass(eq=False, slots=True)
class _Open:
    """A part that has run forward and not yet backward."""

    part: Part
    calls: list[Pair] = field(default_factory=list)
    """Keys and values [1, H_kv, n, D] of each call of attention, in the graph; a layer may call it several times."""
    leaves: list[Pair] = field(default_factory=list)
    """The same as parts below see them."""
    values: Tensor | None = None
    """float[C, E], in the graph."""
    value_leaf: Tensor | None = None
    loss: Tensor | None = None

    def roots(self) -> tuple[list[Tensor], list[Tensor | None]]:
        """What gradients arrive at, and those gradients; None: 1, of the loss."""
        tensors: list[Tensor] = [] if self.loss is None else [self.loss]
        gradients: list[Tensor | None] = [None for _ in tensors]
        pairs = [*zip(self._flat(self.calls), self._flat(self.leaves), strict=True)]
        if self.values is not None and self.value_leaf is not None:
            pairs.append((self.values, self.value_leaf))
        for tensor, leaf in pairs:
            if leaf.grad is not None:
                tensors.append(tensor)
                gradients.append(leaf.grad)
        return tensors, gradients

    @staticmethod
    def _flat(calls: list[Pair]) -> list[Tensor]:
        return [tensor for pair in calls for tensor in pair]


class Gateways:
    """The open parts; passed to every attention call."""

    def __init__(self) -> None:
        self._open: list[_Open] = []
        self._running: _Open | None = None
        self.peak_tokens = 0
        """Most tokens whose graphs were alive at once."""

    def through(self, key: Tensor, value: Tensor) -> Pair:
        """Keys and values [1, H_kv, n, D] of the running part's next call, behind those of the path above it.

        Every part calls attention in the same order.
        """
        if self._running is None:
            return key, value
        above = [part.leaves[len(self._running.calls)] for part in self._open]
        self._running.calls.append((key, value))
        if not above:
            return key, value
        return torch.cat([*(k for k, _ in above), key], dim=2), torch.cat([*(v for _, v in above), value], dim=2)

    def values(self) -> list[Tensor]:
        """float[C, E] of each open part, outermost first."""
        return [part.value_leaf for part in self._open if part.value_leaf is not None]

    def enter(self, part: Part) -> None:
        self.leave(part.start)
        self._running = _Open(part)
        self.peak_tokens = max(self.peak_tokens, len(part) + sum(len(above.part) for above in self._open))

    def finish(self, values: Tensor, loss: Tensor | None) -> None:
        """The running part has run forward."""
        running = self._running
        assert running is not None
        graph = torch.is_grad_enabled()
        running.leaves = [_leaves(pair, graph) for pair in running.calls]
        running.values, running.value_leaf = values, values.detach().requires_grad_(graph)
        running.loss = loss
        self._open.append(running)
        self._running = None

    def leave(self, at: int) -> None:
        """Parts that nothing at or after token `at` hangs from run backward, innermost first."""
        while self._open and self._open[-1].part.close <= at:
            tensors, gradients = self._open.pop().roots()
            if torch.is_grad_enabled() and tensors:
                torch.autograd.backward(tensors, gradients)


def run_parts(
    parts: Sequence[Part],
    forward: Callable[[int, Gateways], Tensor],
    loss: Callable[[int, Tensor, list[Tensor]], Tensor | None],
) -> Gateways:
    """Run a row's parts in order, and backward unless gradients are off.

    `forward(number, gateways)` gives the values float[C, E] of the part's own edges; `loss(number, values, above)` the
    share of the loss that is complete with them, given the values of the open parts above, or None.
    """
    gateways = Gateways()
    for number, part in enumerate(parts):
        gateways.enter(part)
        values = forward(number, gateways)
        gateways.finish(values, loss(number, values, gateways.values()))
    gateways.leave(parts[-1].close if parts else 0)
    return gateways


def _leaves(pair: Pair, graph: bool) -> Pair:
    key, value = (tensor.detach().requires_grad_(graph) for tensor in pair)
    return key, value
