"""One optimizer step shared by several processes: each runs some trees, and all apply the same gradient.

Owns the ranks: the caller's process is rank 0, the others are its children and end with it. Invariants: weights of
units are normalised over the whole step before trees are dealt, so summed gradients are those of one process; a tree is
never split between ranks; every rank takes part in the same collectives, one sum of all gradients a step, however many
trees it was dealt, be it none. A rank that is gone is a `ServiceDied` of the step; commands go through pipes, so that a
rank waits for its next step for as long as its parent lives.
"""

from __future__ import annotations

import multiprocessing as mp
import signal
import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from kat_stream.errors import ServiceDied, StepCancelled
from kat_stream.rl.units import Units
from kat_stream.training.learner import LearnerConfig, TorchLearner
from kat_stream.training.metrics import Tally
from kat_stream.training.rows import plan_micro_batches
from kat_stream.trees.batch import TrainBatch

JOIN_S = 300.0
"""Start of all ranks: imports and the model, on a loaded machine."""
LEAVE_S = 10.0
SHARES = 4
"""Micro-batches a rank, at least, where the trees allow it: the finer they are, the more evenly they are dealt."""
PAIRS_A_TOKEN = 1000.0
"""Pairs of attending tokens that cost as much as one token does elsewhere in the model."""


def open_learner(model_dir: Path, config: LearnerConfig, *, ranks: int, threads: int, step_s: float) -> TorchLearner:
    """A learner of so many processes with so many threads each; `step_s`: longest wait of one rank for the others."""
    if ranks == 1:
        return TorchLearner(model_dir, config)
    return ParallelLearner(model_dir, config, ranks=ranks, threads=threads, step_s=step_s)


def deal(costs: Sequence[float], ranks: int) -> NDArray[np.int64]:
    """int64[len(costs)]: a rank for each micro-batch, contiguous, so that the dearest rank is as cheap as can be."""
    low, high = max(costs, default=0.0), float(sum(costs))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if _fill(costs, middle).max(initial=0) < ranks else (middle, high)
    return _fill(costs, high)


def _fill(costs: Sequence[float], most: float) -> NDArray[np.int64]:
    """Ranks filled one after the other, none beyond `most` (but for rounding)."""
    chosen = np.zeros(len(costs), np.int64)
    rank, load = 0, 0.0
    for number, cost in enumerate(costs):
        if load + cost > most * (1 + 1e-9):
            rank, load = rank + 1, 0.0
        chosen[number], load = rank, load + cost
    return chosen


def predicted_cost(batch: TrainBatch, rows: Sequence[int]) -> float:
    """Of running some rows, in tokens: unique tokens, and pairs that attend."""
    return float(sum(len(batch.rows[row]) + batch.rows[row].pos.sum() / PAIRS_A_TOKEN for row in rows))


def sum_over_ranks(model: torch.nn.Module, flag: bool) -> bool:
    """Add up all gradients in place, in one collective; True if any rank raised its flag. ServiceDied if one left."""
    parameters = list(model.parameters())
    parts = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
    flat = torch.cat([*parts, torch.full((1,), float(flag)).to(parts[0])])
    try:
        dist.all_reduce(flat)
    except RuntimeError as error:  # gloo has no type of its own for a rank that went away or was too late
        raise ServiceDied(f"a rank of the learner is gone: {error}") from error
    for parameter, part in zip(parameters, flat[:-1].split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter).clone()
    return bool(flat[-1] > 0)


class RankLearner(TorchLearner):
    """One rank of several that hold the same weights and are given the same batches."""

    rank: int
    ranks: int

    def join(self, rank: int, ranks: int, rendezvous: Path, step_s: float) -> None:
        """Meet the other ranks."""
        self.rank, self.ranks = rank, ranks
        dist.init_process_group(
            "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks,
            timeout=timedelta(seconds=max(step_s, JOIN_S)),
        )  # fmt: skip

    def _gradients(self, batch: TrainBatch, units: Units, tally: Tally, should_stop: Callable[[], bool]) -> None:
        budget = min(self.config.micro_batch_tokens, max(1, batch.tree_tokens // (SHARES * self.ranks)))
        plan = plan_micro_batches(batch, units, budget)
        ranks = deal([predicted_cost(batch, rows) for rows in plan], self.ranks)
        stopped = False
        for rows in (rows for rows, rank in zip(plan, ranks, strict=True) if rank == self.rank):
            stopped = stopped or should_stop()
            if not stopped:
                self._backward(batch, units, rows, tally)
        if sum_over_ranks(self.model, stopped):
            self.optimizer.zero_grad()
            raise StepCancelled(f"step {self.step_count + 1} was stopped; nothing was changed")


class ParallelLearner(RankLearner):
    """Rank 0, and what starts and commands the others."""

    def __init__(self, model_dir: Path, config: LearnerConfig, *, ranks: int, threads: int, step_s: float) -> None:
        super().__init__(model_dir, config)
        self._step_s = step_s
        self._pipes: list[Connection] = []
        self._children: list[Any] = []
        self._folder = tempfile.TemporaryDirectory(prefix="kat-ranks-")
        rendezvous = Path(self._folder.name) / "meet"
        context = mp.get_context("spawn")
        for rank in range(1, ranks):
            mine, theirs = context.Pipe()
            arguments = (theirs, model_dir, config, rank, ranks, rendezvous, threads, step_s)
            child = context.Process(target=serve_rank, args=arguments, name=f"rank-{rank}", daemon=True)
            child.start()
            theirs.close()
            self._pipes.append(mine)
            self._children.append(child)
        self.join(0, ranks, rendezvous, step_s)

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self._tell("load", state)

    def skip_step(self) -> None:
        super().skip_step()
        self._tell("skip", None)

    def close(self) -> None:
        """End the other ranks."""
        for pipe in self._pipes:
            pipe.close()
        for child in self._children:
            child.join(LEAVE_S)
            child.kill()
        dist.destroy_process_group()
        self._folder.cleanup()

    def _gradients(self, batch: TrainBatch, units: Units, tally: Tally, should_stop: Callable[[], bool]) -> None:
        self._tell("step", batch)
        super()._gradients(batch, units, tally, should_stop)
        for pipe in self._pipes:
            if not pipe.poll(self._step_s):
                raise ServiceDied(f"a rank of the learner said nothing for {self._step_s:g} s")
            tally.merge(pipe.recv())

    def _tell(self, command: str, value: object) -> None:
        for pipe in self._pipes:
            try:
                pipe.send((command, value))
            except OSError as error:
                raise ServiceDied(f"a rank of the learner is gone: {error}") from error


class _Follower(RankLearner):
    """Any other rank: reports its share of the metrics."""

    pipe: Connection

    def _gradients(self, batch: TrainBatch, units: Units, tally: Tally, should_stop: Callable[[], bool]) -> None:
        super()._gradients(batch, units, tally, should_stop)
        self.pipe.send(tally)


def serve_rank(
    pipe: Connection, model_dir: Path, config: LearnerConfig, rank: int, ranks: int, rendezvous: Path, threads: int,
    step_s: float,
) -> None:  # fmt: skip
    """The life of a rank: does what rank 0 says, until that one is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; this process ends with rank 0
    torch.set_num_threads(threads)
    learner = _Follower(model_dir, config)
    learner.pipe = pipe
    learner.join(rank, ranks, rendezvous, step_s)
    while True:
        try:
            command, value = pipe.recv()
        except EOFError:
            return
        if command == "load":
            learner.load(value)
        elif command == "skip":
            learner.skip_step()
        else:
            _follow(learner, value)


def _follow(learner: _Follower, batch: TrainBatch) -> None:
    try:
        learner.step(batch)
    except StepCancelled:
        return
