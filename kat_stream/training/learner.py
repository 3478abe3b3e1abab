"""The torch learner: packed trees in, one optimizer step, weights out.

Invariant: a step either happens whole or not at all: gradients are summed over micro-batches with weights normalised
over the step; a stop or an error leaves everything as it was, and a gradient that is not finite counts the step but
leaves weights and optimizer alone.
Dropout is off (a shared prefix would get one mask for all its paths); the step is not thread-safe, its caller is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging as transformers_logging

from kat_stream.env.plugins import load
from kat_stream.errors import BatchError, CheckpointError, ConfigError, StepCancelled
from kat_stream.rl.objective import Objective
from kat_stream.rl.settings import DistillationConfig, PenaltyConfig, RatioConfig
from kat_stream.training.attention import NAME, Backend
from kat_stream.training.backward import Backward, sampled_values
from kat_stream.training.heap import keep_freed
from kat_stream.training.metrics import StepMetrics, Tally, add
from kat_stream.training.probe import check_model
from kat_stream.training.publication import Publication, atomic_directory, copy_companions, weights_checksum
from kat_stream.training.replay import RoutingReplay
from kat_stream.training.rows import make_micro_batch, plan_micro_batches
from kat_stream.training.shares import Share, split
from kat_stream.trees.batch import TrainBatch
from kat_stream.trees.routes import check_routes, without_routes

transformers_logging.disable_progress_bar()
DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnerConfig:
    loss: str = "turn_ratio"
    """A name of the entry-point group `kat_stream.losses`."""
    ratio: RatioConfig = field(default_factory=RatioConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    penalty: PenaltyConfig = field(default_factory=PenaltyConfig)
    learning_rate: float = 1e-3
    warmup_steps: int = 5
    """Linear from learning_rate / warmup_steps in the first step."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    """Largest gradient norm (2-norm over all parameters)."""
    micro_batch_tokens: int = 4096
    """Unique tokens run at once; a larger tree runs in parts of at most as many."""
    updates: int = 1
    """Optimizer steps that a batch is split into, at most; whole trees, each step normalised over its own turns."""
    routing_replay: bool = False
    """Route tokens to the experts that the batch recorded for them."""
    attention: Backend = "segments"
    dtype: Literal["float32", "float64"] = "float32"
    device: str = "cpu"
    """As torch names it; `cuda` for an accelerator."""


class TorchLearner:
    """A causal model of `transformers` and its AdamW.

    A bad directory raises OSError or ValueError of transformers; a model that trees cannot be trained on `ConfigError`.
    """

    def __init__(self, model_dir: Path, config: LearnerConfig) -> None:
        if config.device == "cpu":
            keep_freed()
        self.model_dir = model_dir
        self.config = config
        self.step_count = 0
        """Optimizer steps since the start of the run: also the number of the policy version."""
        self._objective = Objective(
            policy=load("kat_stream.losses", config.loss),
            ratio=config.ratio,
            distillation=config.distillation,
            penalty=config.penalty,
        )
        self.model = self._load_model()
        self._replay = RoutingReplay(self.model) if config.routing_replay else None
        self._reference = self._load_model() if self._objective.needs_reference else None
        self.optimizer = self._make_optimizer()

    def _make_optimizer(self) -> torch.optim.AdamW:
        config = self.config
        return torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
        )

    def _load_model(self) -> Any:
        try:
            model = AutoModelForCausalLM.from_pretrained(
                self.model_dir, dtype=DTYPES[self.config.dtype], attn_implementation=NAME, local_files_only=True
            )
        except KeyError as error:  # a table of its own instead of the registry
            raise ConfigError(f"policy.model: {self.model_dir} takes no attention from outside: {error}") from error
        if self.config.dtype == "float64":  # the reference: grouped kernels of experts have no such type
            model.set_experts_implementation("eager")
        model = model.train(False).to(self.config.device)
        check_model(model)
        return model

    @property
    def max_positions(self) -> int:
        """Longest path that the model can take, in tokens."""
        return int(self.model.config.get_text_config().max_position_embeddings)

    @property
    def vocabulary(self) -> int:
        """Token ids that the model knows: 0 <= id < vocabulary."""
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def routing(self) -> tuple[int, int] | None:
        """Width of a token's recorded routing and number of experts, if routing is replayed."""
        return None if self._replay is None else self._replay.shape

    def step(self, batch: TrainBatch, should_stop: Callable[[], bool] = lambda: False) -> StepMetrics:
        """One optimizer step on the batch, or `config.updates` of them on parts of it.

        Raises `BatchError` for a batch with no turns, with weights that are all zero, with a path longer than the
        model's positions, an id outside its vocabulary or routed experts of another model; `StepCancelled` if
        `should_stop()` is true between micro-batches of the first update: after it the step is made to its end.
        """
        batch = self._checked(batch)
        began = time.perf_counter()
        tally = Tally()
        shares = self._shares(batch)
        norms: list[float] = []
        for share in shares:
            self.optimizer.zero_grad()
            self._gradients(share, tally, should_stop if not norms else lambda: False)
            norms.append(self._clip())
            if len(norms) == 1:
                self.step_count += 1
            if np.isfinite(norms[-1]):
                self._update()
        self.optimizer.zero_grad()
        applied = bool(np.isfinite(norms).all())
        return tally.finish(
            batch,
            step=self.step_count,
            updates=len(shares),
            applied=applied,
            grad_norm=float(np.max(norms)),
            learning_rate=self._rate if np.isfinite(norms).any() else 0.0,
            seconds=time.perf_counter() - began,
        )

    def _clip(self) -> float:
        """The gradient's norm before it is clipped."""
        return float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip))

    def _shares(self, batch: TrainBatch) -> list[Share]:
        """What each update learns from; those after the first with the log-probs from before it."""
        units = self._objective.units(batch)
        if self.config.updates == 1:
            return [Share(batch, units)]
        parts = split(batch, units, self.config.updates)
        shares = [Share(part, self._objective.units(part)) for part in parts]
        if self.config.ratio.denominator == "train":
            for share in shares[1:]:
                self._look_before(share)
        return shares

    def _look_before(self, share: Share) -> None:
        share.proximal = np.full(share.batch.trained_tokens, np.nan)
        for rows in self._mine(share):
            micro = make_micro_batch(share.batch, rows, self.config.micro_batch_tokens)
            share.proximal[micro.sampled] = sampled_values(self.model, micro, self.config.attention)[0].double().cpu()

    def _mine(self, share: Share) -> list[list[int]]:
        """Micro-batches, as rows, that this process runs."""
        return plan_micro_batches(share.batch, share.units, self.config.micro_batch_tokens)

    def skip_step(self) -> None:
        """Count a step whose groups teach nothing: the weights stay, the next policy version equals this one."""
        self.step_count += 1

    def logprobs(self, batch: TrainBatch) -> NDArray[np.float64]:
        """float64[sum of turn lengths]: log-probs of all sampled tokens under the present weights, in nats."""
        batch = self._checked(batch)
        parts = [
            sampled_values(
                self.model, make_micro_batch(batch, [row], self.config.micro_batch_tokens), self.config.attention
            )[0]
            for row in range(len(batch.rows))
        ]
        return torch.cat(parts).double().cpu().numpy()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, as tensors and plain values."""
        return {
            "step": self.step_count,
            "model": self._weights(),
            "optimizer": self._optimizer_state(),
            "rng": torch.get_rng_state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`. `CheckpointError` if it is of another model."""
        if state.get("learner", "torch") != "torch":
            raise CheckpointError(f"this checkpoint is of the {state['learner']} learner, trainer.learner is torch")
        mine, theirs = _shapes(self.model.state_dict()), _shapes(state["model"])
        if mine != theirs:
            name = min(name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name))
            raise CheckpointError(f"of another model: {name} is {theirs.get(name)}, expected {mine.get(name)}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:  # the settings are ours, the state is theirs
            group |= {"betas": self.config.betas, "weight_decay": self.config.weight_decay}
        torch.set_rng_state(state["rng"])
        self.step_count = state["step"]

    def write_weights(self, directory: Path) -> None:
        """Weights, configuration and tokenizer into an existing directory, as transformers and engines load them."""
        weights = self._weights()
        copy_companions(self.model_dir, directory)
        self.model.config.save_pretrained(directory)
        # In memory transformers 5 holds a layer's experts as one tensor; files name each expert, as SGLang reads them.
        named = revert_weight_conversion(self.model, _untied(self.model, weights))
        save_file(
            {name: value.contiguous() for name, value in named.items()},
            directory / "model.safetensors",
            {"format": "pt"},
        )

    def _weights(self) -> dict[str, Tensor]:
        weights: dict[str, Tensor] = self.model.state_dict()
        return weights

    def _optimizer_state(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def publish(self, directory: Path) -> Publication:
        """The weights as a new Hugging Face directory under exactly this name, with tokenizer and configuration.

        `CheckpointError` if the directory exists.
        """
        with atomic_directory(directory) as work:
            self.write_weights(work)
            checksum = weights_checksum(work)
        return Publication(directory, checksum)

    def _checked(self, batch: TrainBatch) -> TrainBatch:
        """Without recorded routing where it is not replayed: groups may have it of different engines, or not at all."""
        self._check(batch)
        return batch if self._replay is not None else replace(batch, rows=without_routes(batch.rows))

    def _check(self, batch: TrainBatch) -> None:
        if not len(batch.advantage):
            raise BatchError("the batch has no turns")
        depth = max(row.depth for row in batch.rows)
        if depth > self.max_positions:
            raise BatchError(f"a path has {depth} tokens, the model has {self.max_positions} positions")
        largest = max(int(row.ids.max()) for row in batch.rows)
        if largest >= self.vocabulary:
            raise BatchError(f"id {largest} is outside the vocabulary of {self.vocabulary}")
        if self._replay is not None:
            check_routes(batch.rows, *self._replay.shape)

    def _gradients(self, share: Share, tally: Tally, should_stop: Callable[[], bool]) -> None:
        """The gradient of the whole update, or `StepCancelled` and none."""
        for rows in self._mine(share):
            if should_stop():
                self.optimizer.zero_grad()
                raise StepCancelled(f"step {self.step_count + 1} was stopped; nothing was changed")
            self._backward(share, rows, tally)

    def close(self) -> None:
        """Nothing to end: this learner is one process."""

    def _backward(self, share: Share, rows: list[int], tally: Tally) -> None:
        gateways = Backward(
            model=self.model,
            objective=self._objective,
            backend=self.config.attention,
            batch=share.batch,
            units=share.units,
            micro=make_micro_batch(share.batch, rows, self.config.micro_batch_tokens),
            reference=self._reference,
            report=tally.add,
            proximal=share.proximal,
        ).run()
        if self._replay is not None:
            add(tally.counts, self._replay.take())
        tally.peak_tokens = max(tally.peak_tokens, gateways.peak_tokens)

    @property
    def _rate(self) -> float:
        """Learning rate of the step."""
        return self.config.learning_rate * min(1.0, self.step_count / max(self.config.warmup_steps, 1))

    def _update(self) -> None:
        """Apply the gradient."""
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate
        self.optimizer.step()


def _shapes(state: dict[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (value.shape, value.dtype) for name, value in state.items()}


def _untied(model: torch.nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each parameter once, under its first name: loading ties the others again."""
    tied = dict(model.named_parameters(remove_duplicate=False)).keys() - dict(model.named_parameters()).keys()
    return {name: value for name, value in weights.items() if name not in tied}
