"""The processes of a Megatron learner and the groups they form.

Owns torch's and Megatron's process-wide state: one world of ranks a process, one division of it at a time. Ranks with
the same tensor shard form a data parallel group; experts are spread over ranks of that group.
"""

from __future__ import annotations

from datetime import timedelta
from math import ceil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from kat_stream.errors import ConfigError


def join_world(rank: int, ranks: int, rendezvous: Path, wait_s: float) -> None:
    """Meet the other ranks at a file. NCCL and a device each where there is CUDA (never tried), else gloo."""
    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=wait_s),
    )


def check_division(ranks: int, tensor_parallel: int, expert_parallel: int) -> None:
    """`ConfigError` unless the ranks can be divided so."""
    if min(tensor_parallel, expert_parallel) < 1 or ranks % (tensor_parallel * expert_parallel):
        raise ConfigError(
            f"{ranks} ranks cannot be divided by tensor_parallel = {tensor_parallel} times "
            f"expert_parallel = {expert_parallel}"
        )


def divide(tensor_parallel: int, expert_parallel: int, wait_s: float) -> None:
    """Form the groups, in the place of others if there are any."""
    if parallel_state.model_parallel_is_initialized():
        reunite()
    check_division(dist.get_world_size(), tensor_parallel, expert_parallel)
    parallel_state.initialize_model_parallel(
        tensor_parallel,
        expert_model_parallel_size=expert_parallel,
        expert_tensor_parallel_size=1,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=ceil(wait_s / 60),
    )


def reunite() -> None:
    parallel_state.destroy_model_parallel()


def tensor_group() -> Any:
    """Ranks that share every tensor."""
    return parallel_state.get_tensor_model_parallel_group()


def expert_group() -> Any:
    """Ranks that share the experts."""
    return parallel_state.get_expert_model_parallel_group()


def data_group() -> Any:
    """Ranks that hold the same weights, experts aside."""
    return parallel_state.get_data_parallel_group()


def expert_data_group() -> Any:
    """Ranks that hold the same experts."""
    return parallel_state.get_expert_data_parallel_group()
