"""TransferQueue's side of `tests.benchmarks.log`: put and get of samples, run by an interpreter of its own.

Reads one case a line from stdin as JSON (count, size, batch, at_once) and answers with one line on stdout that begins
with RESULT. A sample is two tensors, int32 ids and float32 log-probabilities, together `size` bytes: nothing has to be
serialised, and everything stays in memory. One process puts (`async_kv_batch_put`) while another gets
(`async_kv_batch_get`) what the first one says is there, `at_once` calls in flight on each side.
Its controller and storage units (SimpleStorage) run in plain processes: Ray only starts them (so says its source), its
own daemons would take a share of the two cores, and on a loaded machine they do not come up within Ray's deadline.
Not imported by the project: TransferQueue, Ray and their torch live in that environment.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch
import transfer_queue as tq
from tensordict import TensorDict
from transfer_queue import interface
from transfer_queue.controller import TransferQueueController
from transfer_queue.storage.simple_storage import SimpleStorageUnit

NEVER_S = 300.0
UNITS = (1, 2)
"""Storage units; 2 is its default, 1 may suit two cores better: both are measured."""
START = multiprocessing.get_context("fork")
"""Each process would need seconds to import torch; nothing has a thread or a socket before the fork."""


def _plain(actor: Any) -> Any:
    """The class that Ray would run as an actor."""
    return actor.__ray_metadata__.modified_class


def _controller(pipe: Connection) -> None:
    pipe.send(_plain(TransferQueueController)().get_zmq_server_info())
    pipe.recv()


def _unit(pipe: Connection) -> None:
    pipe.send(_plain(SimpleStorageUnit)({}).get_zmq_server_info())
    pipe.recv()


def _connect(name: str, where: tuple[Any, dict[str, Any]]) -> None:
    controller, units = where
    client = tq.TransferQueueClient(name, controller)
    client.initialize_storage_manager("SimpleStorage", {"zmq_info": units})
    interface._TQ_CLIENT = client


def _put(pipe: Connection, keys: Connection, where: tuple[Any, dict[str, Any]]) -> None:
    """For each case: put its batches, send the names of each through `keys` as soon as it is there."""
    _connect("putter", where)
    pipe.send("ready")
    while (case := pipe.recv()) is not None:
        pipe.send(asyncio.run(_put_all(case, keys)))


async def _put_all(case: dict[str, int], keys: Connection) -> float:
    """When it began. Every sample has memory of its own."""
    width, batch = case["size"] // 8, case["batch"]
    ids, logprobs = torch.randint(0, 150_000, (batch, width), dtype=torch.int32), torch.randn(batch, width)
    calls = iter([[f"{time.monotonic_ns()}-{n + i}" for i in range(batch)] for n in range(0, case["count"], batch)])

    async def lane() -> None:
        for names in calls:
            fields = TensorDict({"ids": ids.clone(), "logprobs": logprobs.clone()}, batch_size=batch)
            await tq.async_kv_batch_put(keys=names, partition_id="bench", fields=fields)
            keys.send(names)

    began = time.monotonic()
    await asyncio.gather(*(lane() for _ in range(case["at_once"])))
    keys.send(None)
    return began


def _get(pipe: Connection, keys: Connection, where: tuple[Any, dict[str, Any]]) -> None:
    """For each case: fetch the batches whose names come, say when the last one was here, and clear them."""
    _connect("getter", where)
    pipe.send("ready")
    while (case := pipe.recv()) is not None:
        pipe.send(asyncio.run(_get_all(case, keys)))


async def _get_all(case: dict[str, int], keys: Connection) -> float:
    done: list[str] = []

    async def lane() -> None:
        while (names := await named.get()) is not None:
            data = await tq.async_kv_batch_get(keys=names, partition_id="bench")
            lengths = {len(row) for row in data["ids"].unbind()}  # rows may come back as one ragged tensor
            assert len(data) == len(names) and lengths == {case["size"] // 8}, data
            done.extend(names)
        named.put_nowait(None)

    named: asyncio.Queue[list[str] | None] = asyncio.Queue()
    lanes = asyncio.gather(*(lane() for _ in range(case["at_once"])))
    while (names := await asyncio.to_thread(keys.recv)) is not None:
        named.put_nowait(names)
    named.put_nowait(None)
    await lanes
    ended = time.monotonic()
    assert len(done) == case["count"], (len(done), case)
    await tq.async_kv_clear(keys=done, partition_id="bench")
    return ended


@contextlib.contextmanager
def _queue(units: int) -> Iterator[tuple[Connection, Connection]]:
    """A TransferQueue with so many storage units; the pipes of its putter and its getter."""
    with contextlib.ExitStack() as stack:

        def started(target: Callable[..., None], *args: object) -> tuple[Connection, Any]:
            ours, theirs = START.Pipe()
            process = START.Process(target=target, args=(theirs, *args), daemon=True)
            process.start()
            theirs.close()  # of a process that died one then reads the end, not silence
            stack.callback(process.join, 10)
            stack.callback(ours.send, None)
            return ours, _recv(ours)

        _, controller = started(_controller)
        where = controller, {f"unit {n}": started(_unit)[1] for n in range(units)}
        reading, writing = START.Pipe(duplex=False)
        yield started(_put, writing, where)[0], started(_get, reading, where)[0]


def _recv(pipe: Connection) -> Any:
    assert pipe.poll(NEVER_S), f"nothing from the other process within {NEVER_S:g} s"
    return pipe.recv()


def main() -> None:
    with contextlib.ExitStack() as stack:
        queues = {f"{units} units": stack.enter_context(_queue(units)) for units in UNITS}
        print("RESULT ready", flush=True)
        for line in sys.stdin:
            case, rates = json.loads(line), {}
            for name, (putter, getter) in queues.items():
                getter.send(case)
                putter.send(case)
                began, ended = _recv(putter), _recv(getter)
                rates[name] = case["count"] / (ended - began)
            print("RESULT", json.dumps(rates), flush=True)


if __name__ == "__main__":
    main()
