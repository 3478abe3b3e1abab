"""TransferQueue's side of `tests.benchmarks.log`: put and get of samples, run by the interpreter of its own environment.

Reads one case a line from stdin as JSON (count, size, batch, at_once) and answers with one line on stdout that begins
with RESULT. A sample is two tensors, int32 ids and float32 log-probabilities, together `size` bytes: nothing has to be
serialised, and everything stays in memory. One process puts while another gets what the first one says is there.
Not imported by the project: TransferQueue, Ray and their torch live in that environment.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection

import ray
import torch
import transfer_queue as tq
from tensordict import TensorDict

LOGICAL_CPUS = 8
"""With 2 it waits for ever for a place for its actors."""


def _connect(address: str | None) -> str:
    context = ray.init(address=address, num_cpus=None if address else LOGICAL_CPUS, log_to_driver=False)
    tq.init()
    return str(context.address_info["gcs_address"])


def _get(pipe: Connection, address: str) -> None:
    """Fetch the batches whose keys come, check their size, and answer a None with when the last one was here."""
    _connect(address)
    pipe.send("ready")
    with ThreadPoolExecutor(64) as pool:
        while True:
            case = pipe.recv()
            if case is None:
                return
            flights: list[Future[None]] = []
            room = multiprocessing.get_context("spawn").Semaphore(case["at_once"])

            def fetch(keys: list[str], case: dict[str, int] = case, room: object = room) -> None:
                data = tq.kv_batch_get(keys=keys, partition_id="bench")
                assert data["ids"].shape == (len(keys), case["size"] // 8), data
                room.release()  # type: ignore[attr-defined]

            while (keys := pipe.recv()) is not None:
                room.acquire()
                flights.append(pool.submit(fetch, keys))
            for flight in flights:
                flight.result()
            pipe.send(time.monotonic())


def _case(pipe: Connection, case: dict[str, int], overlapping: bool) -> float:
    """Samples a second, from the first put until the last was fetched."""
    width, batch = case["size"] // 8, case["batch"]
    ids = torch.randint(0, 150_000, (batch, width), dtype=torch.int32)
    logprobs = torch.randn(batch, width)
    keys = [[f"{time.monotonic_ns()}-{start + i}" for i in range(batch)] for start in range(0, case["count"], batch)]

    def put(names: list[str]) -> None:
        fields = TensorDict({"ids": ids.clone(), "logprobs": logprobs.clone()}, batch_size=batch)
        tq.kv_batch_put(keys=names, partition_id="bench", fields=fields)
        if overlapping:
            pipe.send(names)

    pipe.send(case)
    began = time.monotonic()
    with ThreadPoolExecutor(case["at_once"]) as pool:
        list(pool.map(put, keys))
    if not overlapping:
        for names in keys:
            pipe.send(names)
    pipe.send(None)
    ended: float = pipe.recv()
    tq.kv_clear(keys=[name for names in keys for name in names], partition_id="bench")
    return case["count"] / (ended - began)


def main() -> None:
    address = _connect(None)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    getter = context.Process(target=_get, args=(theirs, address))
    getter.start()
    ours.recv()
    print("RESULT ready", flush=True)
    for line in sys.stdin:
        case = json.loads(line)
        rates = {how: _case(ours, case, how == "overlapping") for how in ("overlapping", "one after the other")}
        print("RESULT", json.dumps(rates), flush=True)
    ours.send(None)
    getter.join(30)
    tq.close()
    ray.shutdown()


if __name__ == "__main__":
    main()
