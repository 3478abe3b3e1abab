"""A model in shares, one a rank: weights, gradients and optimizer state (FSDP2, `torch.distributed.fsdp.fully_shard`).

Invariants: between steps a rank holds its share alone; every rank issues the same collectives in the same order,
however many trees it was dealt. Where all micro-batches run in one part, layers are gathered one after the other and
freed again (a rank that has run out takes part with a token that counts for nothing). A tree in parts has its backward
out of the layers' order, so that for such an update the whole model is gathered once and gradients are shared out
after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from kat_stream.training.attention import Backend, make_plan
from kat_stream.training.gateways import Gateways
from kat_stream.trees.layout import TreeLayout


def shard(model: nn.Module, ranks: int) -> None:
    """Each decoder layer by itself, then the rest; gradients are summed, not averaged."""
    mesh = init_device_mesh(next(model.parameters()).device.type, (ranks,))
    layers = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in _sharded(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """All weights whole in every rank; gradients that the block leaves are those of all ranks, and are shared out."""
    modules = _sharded(model)
    _set_free_running(modules, True)
    for module in modules:
        module.unshard()
    try:
        yield
    finally:
        found = [parameter.grad for parameter in model.parameters()]
        for parameter in model.parameters():
            parameter.grad = None
        for module in modules:
            module.reshard()
        for parameter, gradient in zip(model.parameters(), found, strict=True):
            parameter.grad = None if gradient is None else share_of(gradient, parameter)
        _set_free_running(modules, False)


def take_part(model: nn.Module, backend: Backend) -> None:
    """The collectives of one micro-batch, with a gradient of zero."""
    one, none = np.zeros(1, np.int32), np.empty(0, np.int32)
    row = TreeLayout(one, one, one - 1, one + 1, none, none, none)
    device = next(model.parameters()).device
    at = torch.zeros(1, 1, dtype=torch.int64, device=device)
    output = model(
        input_ids=at, position_ids=at, use_cache=False, tree_plan=make_plan(row, backend, device=device),
        tree_gateways=Gateways(),
    )  # fmt: skip
    torch.autograd.backward(output.logits.sum() * 0.0)


def whole(value: Any) -> Any:
    """A state with every shared tensor whole, in the same containers; a collective of all ranks."""
    if isinstance(value, dict):
        return {name: whole(part) for name, part in value.items()}
    if isinstance(value, list):
        return [whole(part) for part in value]
    return value.full_tensor() if isinstance(value, DTensor) else value


def share_of(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's share of a tensor that every rank has whole, cut as `like` is; no collective."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.detach(), like.device_mesh, like.placements, src_data_rank=None)


def _sharded(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _set_free_running(modules: list[FSDPModule], free: bool) -> None:
    """Whether forward and backward leave weights and gradients where they are, without a collective."""
    for module in modules:
        module.set_requires_gradient_sync(not free, recurse=False)
        module.set_reshard_after_forward(not free, recurse=False)
        module.set_reshard_after_backward(not free, recurse=False)
