"""The ranks of a Megatron learner.

Invariant: every command that rank 0 carries out is carried out by all, in the same order, for each needs the others'
shards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig

from kat_stream.training.learner import LearnerConfig
from kat_stream.training.megatron import groups
from kat_stream.training.megatron.learner import MegatronLearner
from kat_stream.training.megatron.model import check
from kat_stream.training.metrics import StepMetrics, Tally
from kat_stream.training.ranks import Ranks, commands, follow
from kat_stream.training.shares import Share
from kat_stream.trees.batch import TrainBatch


@dataclass(frozen=True, slots=True)
class Order:
    """How the ranks are to build a learner."""

    model_dir: Path
    config: LearnerConfig
    tensor_parallel: int
    expert_parallel: int
    wait_s: float

    def divide(self) -> None:
        groups.divide(self.tensor_parallel, self.expert_parallel, self.wait_s)


class World(Ranks):
    """The processes. They outlive a learner, and can build another."""

    def __init__(self, ranks: int, *, threads: int, step_s: float) -> None:
        super().__init__(serve_rank, ranks, threads=threads, step_s=step_s)
        groups.join_world(0, ranks, self.rendezvous, self.wait_s)


class MegatronLeader(MegatronLearner):
    """Rank 0: the learner that the trainer holds."""

    def __init__(self, world: World, order: Order) -> None:
        self.world = world
        world.tell("build", order)
        order.divide()
        super().__init__(order.model_dir, order.config)

    def step(self, batch: TrainBatch, should_stop: Callable[[], bool] = lambda: False) -> StepMetrics:
        self._check(batch)
        self.world.tell("step", batch)
        with self.world.together():
            return super().step(batch, should_stop)

    def _gradients(self, share: Share, tally: Tally, should_stop: Callable[[], bool]) -> None:
        super()._gradients(share, tally, should_stop)
        for other in self.world.hear():
            tally.merge(other)

    def skip_step(self) -> None:
        self.world.tell("skip")
        super().skip_step()

    def logprobs(self, batch: TrainBatch) -> NDArray[np.float64]:
        self._check(batch)
        self.world.tell("logprobs", batch)
        with self.world.together():
            return super().logprobs(batch)

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self.world.tell("load", state)

    def _weights(self) -> dict[str, Tensor]:
        self.world.tell("weights")
        with self.world.together():
            return super()._weights()

    def _optimizer_state(self) -> dict[str, Any]:
        self.world.tell("optimizer")
        with self.world.together():
            return super()._optimizer_state()

    def part(self) -> None:
        """Give the ranks back to the world."""
        self.world.tell("part")
        groups.reunite()

    def close(self) -> None:
        groups.reunite()
        self.world.close()


class _Follower(MegatronLearner):
    """Any other rank: reports its share of the metrics."""

    pipe: Connection

    def _gradients(self, share: Share, tally: Tally, should_stop: Callable[[], bool]) -> None:
        own = Tally()
        super()._gradients(share, own, should_stop)
        self.pipe.send(own if self.reports else Tally())


def serve_rank(pipe: Connection, rank: int, ranks: int, rendezvous: Path, wait_s: float) -> None:
    """The life of a rank: does what rank 0 says."""
    groups.join_world(rank, ranks, rendezvous, wait_s)
    learner: _Follower | None = None
    for command, value in commands(pipe):
        if command == "build":
            value.divide()
            learner = _Follower(value.model_dir, value.config)
            learner.pipe = pipe
        elif command == "part":
            learner = None
            groups.reunite()
        elif learner is not None:
            follow(learner, command, value)


def open_megatron(
    model_dir: Path, config: LearnerConfig, *, ranks: int, threads: int, step_s: float, tensor_parallel: int,
    expert_parallel: int,
) -> MegatronLeader:  # fmt: skip
    """A learner on so many processes. `ConfigError` if ranks or model cannot be divided so."""
    groups.check_division(ranks, tensor_parallel, expert_parallel)
    check(AutoConfig.from_pretrained(model_dir, local_files_only=True), tensor_parallel, expert_parallel)
    world = World(ranks, threads=threads, step_s=step_s)
    return MegatronLeader(world, Order(model_dir, config, tensor_parallel, expert_parallel, world.wait_s))
