"""The ranks of a Megatron learner: the caller's process is rank 0 and commands the others, its children.

Invariant: every command that rank 0 carries out is carried out by all, in the same order, for each needs the others'
shards. Commands go through pipes, so that a rank waits for its next one for as long as its parent lives; one that is
gone is a `ServiceDied`.
"""

from __future__ import annotations

import multiprocessing as mp
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig

from kat_stream.errors import ServiceDied, StepCancelled
from kat_stream.training.learner import LearnerConfig
from kat_stream.training.megatron import groups
from kat_stream.training.megatron.learner import MegatronLearner
from kat_stream.training.megatron.model import check
from kat_stream.training.metrics import StepMetrics, Tally
from kat_stream.training.parallel import JOIN_S, LEAVE_S
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


class World:
    """The processes. They outlive a learner, and can build another."""

    def __init__(self, ranks: int, *, threads: int, step_s: float) -> None:
        self.ranks = ranks
        self.wait_s = max(step_s, JOIN_S)
        self._pipes: list[Connection] = []
        self._children: list[Any] = []
        self._folder = tempfile.TemporaryDirectory(prefix="kat-megatron-")
        rendezvous = Path(self._folder.name) / "meet"
        context = mp.get_context("spawn")
        for rank in range(1, ranks):
            mine, theirs = context.Pipe()
            arguments = (theirs, rank, ranks, rendezvous, threads, self.wait_s)
            child = context.Process(target=serve_rank, args=arguments, name=f"megatron-{rank}", daemon=True)
            child.start()
            theirs.close()
            self._pipes.append(mine)
            self._children.append(child)
        groups.join_world(0, ranks, rendezvous, self.wait_s)

    def tell(self, command: str, value: object = None) -> None:
        """Have all other ranks do something."""
        for pipe in self._pipes:
            try:
                pipe.send((command, value))
            except OSError as error:
                raise ServiceDied(f"a rank of the learner is gone: {error}") from error

    def hear(self) -> list[Any]:
        """What each other rank has to say."""
        heard = []
        for pipe in self._pipes:
            if not pipe.poll(self.wait_s):
                raise ServiceDied(f"a rank of the learner said nothing for {self.wait_s:g} s")
            try:
                heard.append(pipe.recv())
            except (EOFError, OSError) as error:
                raise ServiceDied(f"a rank of the learner is gone: {error}") from error
        return heard

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around collectives: the back end has no error of its own for a rank that went away or was too late."""
        try:
            yield
        except RuntimeError as error:
            if all(child.is_alive() for child in self._children):
                raise
            raise ServiceDied(f"a rank of the learner is gone: {error}") from error

    def close(self) -> None:
        """End the other ranks."""
        for pipe in self._pipes:
            pipe.close()
        for child in self._children:
            child.join(LEAVE_S)
            child.kill()
        groups.leave_world()
        self._folder.cleanup()


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

    def follow(self, command: str, value: Any) -> None:
        """Do as rank 0 does."""
        match command:
            case "step":
                with suppress(StepCancelled):
                    self.step(value)
            case "skip":
                self.skip_step()
            case "logprobs":
                self.logprobs(value)
            case "load":
                self.load(value)
            case "weights":
                self._weights()
            case "optimizer":
                self._optimizer_state()


def serve_rank(pipe: Connection, rank: int, ranks: int, rendezvous: Path, threads: int, wait_s: float) -> None:
    """The life of a rank: does what rank 0 says, until that one is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; this process ends with rank 0
    torch.set_num_threads(threads)
    groups.join_world(rank, ranks, rendezvous, wait_s)
    learner: _Follower | None = None
    while True:
        try:
            command, value = pipe.recv()
        except EOFError:
            return
        if command == "build":
            value.divide()
            learner = _Follower(value.model_dir, value.config)
            learner.pipe = pipe
        elif command == "part":
            learner = None
            groups.reunite()
        elif learner is not None:
            learner.follow(command, value)


def open_megatron(
    model_dir: Path, config: LearnerConfig, *, ranks: int, threads: int, step_s: float, tensor_parallel: int,
    expert_parallel: int,
) -> MegatronLeader:  # fmt: skip
    """A learner on so many processes. `ConfigError` if ranks or model cannot be divided so."""
    groups.check_division(ranks, tensor_parallel, expert_parallel)
    check(AutoConfig.from_pretrained(model_dir, local_files_only=True), tensor_parallel, expert_parallel)
    world = World(ranks, threads=threads, step_s=step_s)
    return MegatronLeader(world, Order(model_dir, config, tensor_parallel, expert_parallel, world.wait_s))
