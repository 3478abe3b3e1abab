"""The processes that share a learner: the caller's is rank 0 and commands the others, its children.

Owns their start, the pipes to them and their end, and what each of them adds up with the others. Invariants: commands
go through pipes, so that a rank waits for its next one for as long as its parent lives, and ends with it; one that is
gone, or says nothing, is a `ServiceDied`; one that could not use its share of the data has said why before, and that
`DataError` is raised in its place.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import socket
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kat_stream.errors import BatchError, DataError, ServiceDied, StepCancelled
from kat_stream.training.learner import TorchLearner

JOIN_S = 300.0
"""Start of all ranks: imports and the model, on a loaded machine."""
LEAVE_S = 10.0

Serve = Callable[[Connection, int, int, Path, float], None]
"""The life of a rank: `serve(pipe, rank, ranks, rendezvous, wait_s)`."""


class Ranks:
    """All ranks but the first. `rendezvous`: the file at which the caller and they meet."""

    def __init__(self, serve: Serve, ranks: int, *, threads: int, step_s: float) -> None:
        """`serve` is pickled; `step_s`: longest wait of one rank for the others."""
        self.ranks = ranks
        self.wait_s = max(step_s, JOIN_S)
        self.children: list[Any] = []
        self._pipes: list[Connection] = []
        self._folder = tempfile.TemporaryDirectory(prefix="kat-ranks-")
        self.rendezvous = Path(self._folder.name) / "meet"
        context = mp.get_context("spawn")
        for rank in range(1, ranks):
            mine, theirs = context.Pipe()
            arguments = (serve, threads, theirs, rank, ranks, self.rendezvous, self.wait_s)
            child = context.Process(target=_live, args=arguments, name=f"rank-{rank}", daemon=True)
            child.start()
            theirs.close()
            _limit(mine, self.wait_s)
            self._pipes.append(mine)
            self.children.append(child)

    def tell(self, command: str, value: object = None) -> None:
        """Have all other ranks do something."""
        for pipe in self._pipes:
            try:
                pipe.send((command, value))
            except BlockingIOError as error:
                raise ServiceDied(f"a rank of the learner took nothing for {self.wait_s:g} s") from error
            except OSError as error:
                raise self._gone(error) from error

    def hear(self) -> list[Any]:
        """What each other rank has to say."""
        heard = []
        for pipe in self._pipes:
            if not pipe.poll(self.wait_s):
                raise ServiceDied(f"a rank of the learner said nothing for {self.wait_s:g} s")
            try:
                heard.append(pipe.recv())
            except (EOFError, OSError) as error:
                raise self._gone(error) from error
            if isinstance(heard[-1], DataError):
                raise heard[-1]
        return heard

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around collectives: the back end has no error of its own for a rank that went away or was too late."""
        try:
            yield
        except ServiceDied as error:  # a rank may still be ending: what it said is here already
            raise self._gone(error) from error
        except RuntimeError as error:
            if all(child.is_alive() for child in self.children):
                raise
            raise self._gone(error) from error

    def _gone(self, error: BaseException) -> DataError | ServiceDied:
        """What a rank said before it went, or what its absence looks like from here."""
        for pipe in self._pipes:
            with suppress(EOFError, OSError):
                while pipe.poll():
                    last = pipe.recv()
                    if isinstance(last, DataError):
                        return last
        return error if isinstance(error, ServiceDied) else ServiceDied(f"a rank of the learner is gone: {error}")

    def close(self) -> None:
        """End the other ranks, and the process group of this one."""
        for pipe in self._pipes:
            pipe.close()
        for child in self.children:
            child.join(LEAVE_S)
            child.kill()
        dist.destroy_process_group()
        self._folder.cleanup()


def _limit(pipe: Connection, wait_s: float) -> None:
    """Make a write that finds no room, or a read in the middle of a message, end in BlockingIOError after so long."""
    limit = struct.pack("ll", int(wait_s), int(wait_s % 1 * 1e6))
    with socket.socket(fileno=os.dup(pipe.fileno())) as end:  # options are the socket's, whoever sets them
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            end.setsockopt(socket.SOL_SOCKET, option, limit)


def _live(serve: Serve, threads: int, pipe: Connection, rank: int, ranks: int, rendezvous: Path, wait_s: float) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; this process ends with rank 0
    torch.set_num_threads(threads)
    try:
        serve(pipe, rank, ranks, rendezvous, wait_s)
    except DataError as error:
        with suppress(OSError):  # rank 0 is gone, too
            pipe.send(error)
        raise
    os._exit(0)  # nothing is left to do, and the native end of a process group takes 10 s


def commands(pipe: Connection) -> Iterator[tuple[str, Any]]:
    """What rank 0 says, until that one is gone."""
    while True:
        try:
            yield pipe.recv()
        except EOFError:
            return


def follow(learner: TorchLearner, command: str, value: Any) -> None:
    """Do as rank 0 does."""
    match command:
        case "load":
            learner.load(value)
        case "skip":
            learner.skip_step()
        case "logprobs":
            learner.logprobs(value)
        case "weights":
            learner._weights()
        case "optimizer":
            learner._optimizer_state()
        case _:
            with suppress(StepCancelled, BatchError):  # rank 0 has the same and tells its caller
                learner.step(value)


def gradients_of(parameters: Iterable[Tensor]) -> list[Tensor]:
    """One of each parameter, zero where a rank has had none: all ranks have as much to add up."""
    found = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        found.append(parameter.grad)
    return found


def sum_in_one(tensors: Sequence[Tensor], group: Any = None) -> None:
    """Sum in place over the ranks of a group (None: all), in one collective."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat, group=group)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def any_rank(flag: bool, device: str = "cpu") -> bool:
    """True if any rank raised its flag; one collective."""
    flags = torch.full((1,), float(flag), device=device)
    dist.all_reduce(flags)
    return bool(flags > 0)
