"""TransferQueue's side of `tests.benchmarks.log`: put and get of samples, run by an interpreter of its own.

Reads one case a line from stdin as JSON (count, size, batch, at_once) and answers with one line on stdout that begins
with RESULT. A sample is two tensors, int32 ids and float32 log-probabilities, together `size` bytes: nothing has to be
serialised, and everything stays in memory. One process puts while another gets what the first one says is there.
Not imported by the project: TransferQueue, Ray and their torch live in that environment.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection

import ray
import torch
import transfer_queue as tq
from tensordict import TensorDict

LOGICAL_CPUS = 8
"""With 2 it waits for ever for a place for its actors."""
NEVER_S = 600.0


def _connect(address: str | None) -> str:
    local = {"num_cpus": LOGICAL_CPUS, "include_dashboard": False} if address is None else {"address": address}
    context = ray.init(log_to_driver=False, **local)
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
            room = threading.Semaphore(case["at_once"])
            while (keys := pipe.recv()) is not None:
                room.acquire()
                flights.append(pool.submit(_fetch, keys, case["size"] // 8, room))
            for flight in flights:
                flight.result()
            pipe.send(time.monotonic())


def _fetch(keys: list[str], width: int, room: threading.Semaphore) -> None:
    try:
        data = tq.kv_batch_get(keys=keys, partition_id="bench")
        lengths = {len(row) for row in data["ids"].unbind()}  # rows come back as one ragged tensor
        assert len(data) == len(keys) and lengths == {width}, data
    finally:
        room.release()


def _case(pipe: Connection, case: dict[str, int], overlapping: bool) -> float:
    """Samples a second, from the first put until the last was fetched."""
    width, batch = case["size"] // 8, case["batch"]
    ids = torch.randint(0, 150_000, (batch, width), dtype=torch.int32)
    logprobs = torch.randn(batch, width)
    keys = [[f"{time.monotonic_ns()}-{start + i}" for i in range(batch)] for start in range(0, case["count"], batch)]

    one_sends = threading.Lock()

    def put(names: list[str]) -> None:
        fields = TensorDict({"ids": ids.clone(), "logprobs": logprobs.clone()}, batch_size=batch)
        tq.kv_batch_put(keys=names, partition_id="bench", fields=fields)
        if overlapping:
            with one_sends:
                pipe.send(names)

    pipe.send(case)
    began = time.monotonic()
    with ThreadPoolExecutor(case["at_once"]) as pool:
        list(pool.map(put, keys))
    if not overlapping:
        for names in keys:
            pipe.send(names)
    pipe.send(None)
    assert pipe.poll(NEVER_S), f"the getter did not end within {NEVER_S:g} s"
    ended: float = pipe.recv()
    tq.kv_clear(keys=[name for names in keys for name in names], partition_id="bench")
    return case["count"] / (ended - began)


def main() -> None:
    address = _connect(None)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    getter = context.Process(target=_get, args=(theirs, address))
    getter.start()
    theirs.close()  # a getter that dies is then the end of the pipe, not silence
    assert ours.poll(NEVER_S), f"the getter was not ready within {NEVER_S:g} s"
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
