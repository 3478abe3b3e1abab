"""One rank of the Megatron learner.

Invariant: the step is the torch learner's. Ranks of a data parallel group run different trees in rounds, in which each
runs one micro-batch, so that collectives inside the layers meet; a rank without one of its own, and all but one when a
tree runs in parts, repeat another's with weight 0. Weights of units are normalised over the whole step, so gradients
are summed, never averaged, and the norm that is clipped is that of the whole model.
State is in the Hugging Face layout, so that it can be resumed with any division of the ranks: bitwise with the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig

from kat_stream.errors import CheckpointError, ConfigError, StepCancelled
from kat_stream.training.dealing import predicted_cost
from kat_stream.training.learner import DTYPES, LearnerConfig, TorchLearner
from kat_stream.training.megatron import groups
from kat_stream.training.megatron.model import TreeModel
from kat_stream.training.megatron.weights import Sharding, Shards, load_weights
from kat_stream.training.metrics import Tally
from kat_stream.training.parallel import SHARES
from kat_stream.training.ranks import any_rank, gradients_of, sum_in_one
from kat_stream.training.rows import plan_micro_batches
from kat_stream.training.shares import Share

KIND = "megatron"
MOMENTS = ("exp_avg", "exp_avg_sq")


class MegatronLearner(TorchLearner):
    """Groups must have been formed (`groups.divide`); every rank must be asked the same."""

    def __init__(self, model_dir: Path, config: LearnerConfig) -> None:
        if config.routing_replay:
            raise ConfigError("routing_replay is the torch learner's: the Megatron learner does not have it")
        super().__init__(model_dir, config)
        self._shards = Shards(self.model)

    def _load_model(self) -> TreeModel:
        config = AutoConfig.from_pretrained(self.model_dir, local_files_only=True)
        config.dtype = DTYPES[self.config.dtype]
        model = TreeModel(
            config,
            DTYPES[self.config.dtype],
            tensor_parallel=groups.tensor_group().size(),
            expert_parallel=groups.expert_group().size(),
        )
        load_weights(model, self.model_dir)
        return model.train(False).to(self.config.device)

    @property
    def reports(self) -> bool:
        """One of the ranks that run the same trees speaks for all."""
        return bool(groups.tensor_group().rank() == 0)

    def load(self, state: dict[str, Any]) -> None:
        if state.get("learner") != KIND:
            raise CheckpointError("this checkpoint is of the torch learner, trainer.learner is megatron")
        mine = self._parameters
        self._place(state["model"], mine)
        for moment in MOMENTS:
            self._place(state["optimizer"][moment], self._moments(moment))
        for parameter in mine.values():
            self.optimizer.state[parameter]["step"] = torch.tensor(state["optimizer"]["step"])
        torch.set_rng_state(state["rng"])
        self.step_count = state["step"]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "learner": KIND}

    def _weights(self) -> dict[str, Tensor]:
        return self._shards.gather(self._parameters)

    def _optimizer_state(self) -> dict[str, Any]:
        steps = [float(entry["step"]) for entry in self.optimizer.state.values()]
        return {
            "step": max(steps, default=0.0),
            **{moment: self._shards.gather(self._moments(moment)) for moment in MOMENTS},
        }

    @property
    def _parameters(self) -> dict[str, Tensor]:
        return dict(self.model.gpt.named_parameters())

    def _moments(self, moment: str) -> dict[str, Tensor]:
        """AdamW's, made where there are none yet."""
        found = {}
        for name, parameter in self._parameters.items():
            entry = self.optimizer.state[parameter]
            for each in MOMENTS:
                entry.setdefault(each, torch.zeros_like(parameter))
            entry.setdefault("step", torch.tensor(0.0))
            found[name] = entry[moment]
        return found

    def _place(self, whole: dict[str, Tensor], targets: dict[str, Tensor]) -> None:
        if whole.keys() != self._shards.names:
            name = min(whole.keys() ^ self._shards.names)
            raise CheckpointError(f"of another model: {name} is in one of them only")
        self._shards.place(whole.__getitem__, targets)

    def _mine(self, share: Share) -> list[list[int]]:
        return [rows for rows, _ in self._rounds(share)]

    def _rounds(self, share: Share) -> list[tuple[list[int], bool]]:
        """What this rank runs, and whether it does so for itself: as many rounds on every rank."""
        batch = share.batch
        rank, ranks = groups.data_group().rank(), groups.data_group().size()
        budget = self.config.micro_batch_tokens
        finer = budget if ranks == 1 else min(budget, max(1, batch.tree_tokens // (SHARES * ranks)))
        plan = plan_micro_batches(batch, share.units, finer)
        whole = [rows for rows in plan if sum(len(batch.rows[row]) for row in rows) <= budget]
        whole.sort(key=lambda rows: predicted_cost(batch, rows))
        found = []
        for start in range(0, len(whole), ranks):
            alike = whole[start : start + ranks]
            found.append((alike[rank], True) if rank < len(alike) else (alike[-1], False))
        return found + [(rows, rank == 0) for rows in plan if rows not in whole]

    def _gradients(self, share: Share, tally: Tally, should_stop: Callable[[], bool]) -> None:
        silent = replace(share, units=replace(share.units, weight=np.zeros_like(share.units.weight)))
        for rows, own in self._rounds(share):
            if any_rank(should_stop(), self.config.device):
                self.optimizer.zero_grad()
                raise StepCancelled(f"step {self.step_count + 1} was stopped; nothing was changed")
            self._backward(share if own else silent, rows, tally if own else Tally())
        self._sum_gradients()

    def _sum_gradients(self) -> None:
        """Over the ranks that ran other trees, and over tensor parallel ranks where each saw only its own heads."""
        gradients_of(self._parameters.values())
        _sum(self._gradients_of("replicated", "heads", "tensor"), groups.data_group())
        _sum(self._gradients_of("expert"), groups.expert_data_group())
        _sum(self._gradients_of("heads"), groups.tensor_group())

    def _gradients_of(self, *shardings: Sharding) -> list[Tensor]:
        return [
            parameter.grad
            for name, parameter in self._parameters.items()
            if parameter.grad is not None and self._shards.slots[name].sharding in shardings
        ]

    def _clip(self) -> float:
        whole = _squares(self._gradients_of("replicated", "heads"))
        shards = _squares(self._gradients_of("tensor"), groups.tensor_group())
        experts = _squares(self._gradients_of("expert"), groups.expert_group())
        norm = (whole + shards + experts).sqrt()
        torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.grad_clip, norm)
        return float(norm)


def _sum(tensors: list[Tensor], group: Any) -> None:
    """Where there is somebody to add up with, and something to add up."""
    if group.size() > 1 and tensors:
        sum_in_one(tensors, group)


def _squares(tensors: list[Tensor], group: Any = None) -> Tensor:
    """float64[]: sum of squares, of the shards of all ranks of a group."""
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    total = torch.stack([tensor.double().square().sum() for tensor in tensors]).sum()
    if group is not None and group.size() > 1:
        dist.all_reduce(total, group=group)
    return total
