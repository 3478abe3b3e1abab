"""The gradient of one micro-batch, whatever its size: in one part, or in parts joined by gateways.

Invariant: each unit's loss is computed once, on all its tokens. If all units lie on paths (tokens, turns), it is
computed in the part that ends them. A unit over several branches (a sequence) is complete only when every part has
run: then a first pass without a graph gives the values, and the second one backpropagates their exact gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kat_stream.rl.loss import LossInputs, LossOutput
from kat_stream.rl.objective import Objective
from kat_stream.rl.units import Units
from kat_stream.training.attention import Backend
from kat_stream.training.gateways import Gateways, run_parts
from kat_stream.training.rows import MicroBatch, edge_values, part_inputs
from kat_stream.trees.batch import TrainBatch

Report = Callable[[LossInputs, LossOutput], None]
Wide = NDArray[np.int64]


@dataclass(frozen=True, eq=False, slots=True)
class Backward:
    """One micro-batch of a step, ready to be run."""

    model: torch.nn.Module
    objective: Objective
    backend: Backend
    batch: TrainBatch
    units: Units
    micro: MicroBatch
    reference: torch.nn.Module | None
    """Frozen, for the KL term."""
    report: Report
    proximal: NDArray[np.float64] | None = None
    """float64[all sampled tokens of the batch]: the policy's log-probs before the first update on it; None: now."""

    def run(self) -> Gateways:
        """Add the micro-batch's share to the gradients of the model's parameters."""
        owner = self._last_part()
        reference = None if self.reference is None else sampled_values(self.reference, self.micro, self.backend)[0]
        if self._on_paths(owner):
            return self._run(lambda number, own, above: self._ending_here(owner, number, own, above, reference))
        gradient = self._gradient(reference)
        return self._run(lambda number, own, above: self._linear(gradient, number, own))

    def _run(self, loss: Callable[[int, Tensor, list[Tensor]], Tensor | None]) -> Gateways:
        return run_parts(self.micro.parts, self._forward, loss)

    def _forward(self, number: int, gateways: Gateways) -> Tensor:
        inputs = part_inputs(self.micro, number, self.backend, _device(self.model))
        return edge_values(self.model, inputs, gateways, entropy=self.objective.needs_entropy)

    def _last_part(self) -> Wide:
        """int64[S]: the last part in which the unit of each sampled token has an edge."""
        unit = self.units.unit[self.micro.sampled]
        last = np.full(len(self.units.length), -1)
        np.maximum.at(last, unit, self.micro.part[self.micro.edge])
        return last[unit]

    def _on_paths(self, owner: Wide) -> bool:
        """True if every unit has its edges in the part that ends it and in parts open above that."""
        parts, part = self.micro.parts, self.micro.part[self.micro.edge]
        start = np.array([p.start for p in parts])
        close = np.array([p.close for p in parts])
        return bool(((part == owner) | (close[part] > start[owner])).all())

    def _ending_here(
        self, owner: Wide, number: int, own: Tensor, above: list[Tensor], reference: Tensor | None
    ) -> Tensor | None:
        """Loss of the units that end in this part."""
        local = np.flatnonzero(owner == number)
        if not len(local):
            return None
        path = [*self.micro.path_of(number), number]
        base = np.zeros(len(self.micro.parts), np.int64)
        base[path] = np.cumsum([0, *(values.shape[1] for values in above)])
        edge = self.micro.edge[local]
        index = torch.from_numpy(base[self.micro.part[edge]] + self.micro.slot[edge]).to(own.device)
        values = torch.cat([*above, own], dim=1).index_select(1, index)
        return self._loss(local, values, reference)

    def _gradient(self, reference: Tensor | None) -> Tensor:
        """float[C, S]: of the loss of all units, with respect to the values of sampled tokens."""
        values = sampled_values(self.model, self.micro, self.backend, entropy=self.objective.needs_entropy)
        leaf = values.requires_grad_()
        torch.autograd.backward(self._loss(np.arange(values.shape[1]), leaf, reference))
        assert leaf.grad is not None
        return leaf.grad

    def _linear(self, gradient: Tensor, number: int, own: Tensor) -> Tensor | None:
        """A loss on the part's own edges whose gradient is the given one."""
        local = np.flatnonzero(self.micro.part[self.micro.edge] == number)
        if not len(local):
            return None
        index = torch.from_numpy(self.micro.slot[self.micro.edge[local]]).to(own.device)
        return (gradient[:, torch.from_numpy(local).to(own.device)] * own.index_select(1, index)).sum()

    def _loss(self, local: Wide, values: Tensor, reference: Tensor | None) -> Tensor:
        inputs = self._inputs(local, values, reference)
        output = self.objective.value(inputs)
        self.report(inputs, output)
        return output.loss

    def _inputs(self, local: Wide, values: Tensor, reference: Tensor | None) -> LossInputs:
        """Whole units around their values float[C, S]; `local` int64[S] are places among the micro-batch's tokens."""
        sampled = self.micro.sampled[local]
        unit, inverse = np.unique(self.units.unit[sampled], return_inverse=True)

        def floats(array: NDArray[np.floating]) -> Tensor:
            return torch.from_numpy(array).to(values)

        teacher = self.batch.teacher_logprobs
        return LossInputs(
            logp=values[0],
            rollout_logp=floats(self.batch.behaviour[sampled]),
            unit=torch.from_numpy(inverse).to(values.device),
            length=floats(self.units.length[unit]),
            advantage=floats(self.units.advantage[unit]),
            weight=floats(self.units.weight[unit]),
            prox_logp=None if self.proximal is None else floats(self.proximal[sampled]),
            teacher_logp=None if teacher is None else floats(teacher[sampled]),
            reference_logp=None if reference is None else reference[torch.from_numpy(local).to(values.device)],
            entropy=values[1] if len(values) > 1 else None,
        )


def sampled_values(model: torch.nn.Module, micro: MicroBatch, backend: Backend, *, entropy: bool = False) -> Tensor:
    """float[1 or 2, S]: log-probs (and entropies) of the micro-batch's sampled tokens, without a graph."""
    device = _device(model)
    found: list[Tensor] = []

    def keep(number: int, own: Tensor, above: list[Tensor]) -> None:
        found.append(own)

    with torch.no_grad():
        run_parts(
            micro.parts,
            lambda number, gateways: edge_values(
                model, part_inputs(micro, number, backend, device), gateways, entropy=entropy
            ),
            keep,
        )
    counts = np.array([values.shape[1] for values in found])
    index = (np.cumsum(counts) - counts)[micro.part[micro.edge]] + micro.slot[micro.edge]
    return torch.cat(found, dim=1).index_select(1, torch.from_numpy(index).to(device))


def _device(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device
