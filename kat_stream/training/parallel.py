"""One optimizer step shared by several processes: each runs some trees, and all apply the same gradient.

Invariants: weights of units are normalised over the whole step before trees are dealt, so summed gradients are those
of one process; a tree is never split between ranks; every rank takes part in the same collectives, one sum of all
gradients a step, however many trees it was dealt, be it none. A rank that is gone is a `ServiceDied` of the step.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from kat_stream.errors import ServiceDied, StepCancelled
from kat_stream.training.dealing import deal, predicted_cost
from kat_stream.training.learner import LearnerConfig, TorchLearner
from kat_stream.training.metrics import StepMetrics, Tally
from kat_stream.training.ranks import Ranks, any_rank, commands, follow, gradients_of, sum_in_one
from kat_stream.training.rows import plan_micro_batches
from kat_stream.training.sharding import gathered, shard, share_of, take_part, whole
from kat_stream.training.shares import Share
from kat_stream.trees.batch import TrainBatch

Sharding = Literal["none", "full"]
"""Each rank holds the whole model, or a share of weights, gradients and optimizer state (FSDP2)."""
SHARES = 4
"""Micro-batches a rank, at least, where the trees allow it: the finer they are, the more evenly they are dealt."""


def open_learner(
    model_dir: Path, config: LearnerConfig, *, ranks: int, threads: int, step_s: float, sharding: Sharding = "none"
) -> TorchLearner:
    """A learner of so many processes with so many threads each; `step_s`: longest wait of one rank for the others."""
    if ranks == 1:
        return TorchLearner(model_dir, config)
    return ParallelLearner(model_dir, config, ranks=ranks, threads=threads, step_s=step_s, sharding=sharding)


def sum_over_ranks(model: torch.nn.Module, flag: bool) -> bool:
    """Add up all gradients in place, in one collective; True if any rank raised its flag. ServiceDied if one left.

    A parameter that has no gradient in any rank keeps none: a zero would have the optimizer decay it.
    """
    parameters = list(model.parameters())
    has = [float(parameter.grad is not None) for parameter in parameters]
    gradients = gradients_of(parameters)
    raised = gradients[0].new_tensor([float(flag), *has])
    try:
        sum_in_one([*gradients, raised])
    except RuntimeError as error:  # gloo has no type of its own for a rank that went away or was too late
        raise ServiceDied(f"a rank of the learner is gone: {error}") from error
    for parameter, ranks in zip(parameters, raised[1:], strict=True):
        if not ranks:
            parameter.grad = None
    return bool(raised[0] > 0)


class RankLearner(TorchLearner):
    """One rank of several that hold the same weights and are given the same batches."""

    rank: int
    ranks: int
    sharding: Sharding

    def join(self, rank: int, ranks: int, rendezvous: Path, wait_s: float, sharding: Sharding) -> None:
        """Meet the other ranks; from then on weights and optimizer state may be in shares."""
        self.rank, self.ranks, self.sharding = rank, ranks, sharding
        dist.init_process_group(
            "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks, timeout=timedelta(seconds=wait_s),
        )  # fmt: skip
        if sharding == "full":
            shard(self.model, ranks)
            self.optimizer = self._make_optimizer()

    def load(self, state: dict[str, Any]) -> None:
        super().load(state if self.sharding == "none" else self._shares_of(state))

    def logprobs(self, batch: TrainBatch) -> NDArray[np.float64]:
        with self._gathered():
            return super().logprobs(batch)

    def _shares_of(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state with this rank's share of every tensor that is one."""
        mine = self.model.state_dict()
        parameters = self.optimizer.param_groups[0]["params"]
        moments = {
            number: {name: share_of(value, parameters[number]) for name, value in entry.items()}
            for number, entry in state["optimizer"]["state"].items()
        }
        weights = {name: share_of(value, mine.get(name, value)) for name, value in state["model"].items()}
        return {**state, "model": weights, "optimizer": {**state["optimizer"], "state": moments}}

    def _weights(self) -> dict[str, Tensor]:
        weights: dict[str, Tensor] = whole(super()._weights())
        return weights

    def _optimizer_state(self) -> dict[str, Any]:
        state: dict[str, Any] = whole(super()._optimizer_state())
        return state

    def _gathered(self) -> AbstractContextManager[None]:
        return nullcontext() if self.sharding == "none" else gathered(self.model)

    def _look_before(self, share: Share) -> None:
        with self._gathered():
            super()._look_before(share)

    def _clip(self) -> float:
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        return float(whole(norm))

    def _mine(self, share: Share) -> list[list[int]]:
        return self._dealt(share)[self.rank]

    def _dealt(self, share: Share) -> list[list[list[int]]]:
        """Micro-batches of each rank."""
        batch = share.batch
        budget = min(self.config.micro_batch_tokens, max(1, batch.tree_tokens // (SHARES * self.ranks)))
        plan = plan_micro_batches(batch, share.units, budget)
        ranks = deal([predicted_cost(batch, rows) for rows in plan], self.ranks)
        return [[plan[i] for i in np.flatnonzero(ranks == number)] for number in range(self.ranks)]

    def _gradients(self, share: Share, tally: Tally, should_stop: Callable[[], bool]) -> None:
        dealt = self._dealt(share)
        largest = max(sum(len(share.batch.rows[row]) for row in rows) for one in dealt for rows in one)
        if self.sharding == "none" or largest > self.config.micro_batch_tokens:
            with self._gathered():
                stopped = self._alone(share, dealt[self.rank], tally, should_stop)
        else:
            stopped = self._in_step(share, dealt[self.rank], max(map(len, dealt)), tally, should_stop)
        if stopped:
            self.optimizer.zero_grad()
            raise StepCancelled(f"step {self.step_count + 1} was stopped; nothing was changed")

    def _alone(self, share: Share, mine: list[list[int]], tally: Tally, should_stop: Callable[[], bool]) -> bool:
        """Each rank by itself, then one sum of all gradients. Whether a rank was stopped."""
        stopped = False
        for rows in mine:
            stopped = stopped or should_stop()
            if not stopped:
                self._backward(share, rows, tally)
        return sum_over_ranks(self.model, stopped)

    def _in_step(
        self, share: Share, mine: list[list[int]], rounds: int, tally: Tally, should_stop: Callable[[], bool]
    ) -> bool:
        """One micro-batch of every rank after the other, as they share the layers. Whether a rank was stopped."""
        stopped = False
        for number in range(rounds):
            stopped = stopped or should_stop()
            if number < len(mine) and not stopped:
                self._backward(share, mine[number], tally)
            else:
                take_part(self.model, self.config.attention)
                if self._replay is not None:
                    self._replay.take()  # not a token of the step
        return any_rank(stopped)


class ParallelLearner(RankLearner):
    """Rank 0, and what starts and commands the others."""

    def __init__(
        self,
        model_dir: Path,
        config: LearnerConfig,
        *,
        ranks: int,
        threads: int,
        step_s: float,
        sharding: Sharding = "none",
    ) -> None:
        super().__init__(model_dir, config)
        self.others = Ranks(partial(serve_rank, model_dir, config, sharding), ranks, threads=threads, step_s=step_s)
        self.join(0, ranks, self.others.rendezvous, self.others.wait_s, sharding)

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self.others.tell("load", state)

    def logprobs(self, batch: TrainBatch) -> NDArray[np.float64]:
        self._check(batch)
        self._ask("logprobs", batch)
        return super().logprobs(batch)

    def _weights(self) -> dict[str, Tensor]:
        self._ask("weights")
        return super()._weights()

    def _optimizer_state(self) -> dict[str, Any]:
        self._ask("optimizer")
        return super()._optimizer_state()

    def skip_step(self) -> None:
        super().skip_step()
        self.others.tell("skip")

    def close(self) -> None:
        """End the other ranks."""
        self.others.close()

    def step(self, batch: TrainBatch, should_stop: Callable[[], bool] = lambda: False) -> StepMetrics:
        self._check(batch)
        self.others.tell("step", batch)
        with self.others.together():
            return super().step(batch, should_stop)

    def _gradients(self, share: Share, tally: Tally, should_stop: Callable[[], bool]) -> None:
        super()._gradients(share, tally, should_stop)
        for other in self.others.hear():
            tally.merge(other)

    def _ask(self, command: str, value: object = None) -> None:
        """Other ranks are needed where this one has only a share."""
        if self.sharding != "none":
            self.others.tell(command, value)


class _Follower(RankLearner):
    """Any other rank: reports its share of the metrics."""

    pipe: Connection

    def _gradients(self, share: Share, tally: Tally, should_stop: Callable[[], bool]) -> None:
        own = Tally()
        super()._gradients(share, own, should_stop)
        self.pipe.send(own)


def serve_rank(
    model_dir: Path, config: LearnerConfig, sharding: Sharding,
    pipe: Connection, rank: int, ranks: int, rendezvous: Path, wait_s: float,
) -> None:  # fmt: skip
    """The life of a rank: does what rank 0 says."""
    learner = _Follower(model_dir, config)
    learner.pipe = pipe
    learner.join(rank, ranks, rendezvous, wait_s, sharding)
    for command, value in commands(pipe):
        follow(learner, command, value)
