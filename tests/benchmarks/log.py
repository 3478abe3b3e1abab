"""Durable trajectories a second, against a queue in memory: `python -m tests.benchmarks.log`.

One process publishes trajectories, another reads and decodes them, at the same time, on one real broker with acks=all:
by `Log.follow`, as a consumer group that commits (`run_work`), and as such a group with values over --limit in a
directory (claim-check: each is synced to the disk before its record is sent). In the same run TransferQueue 0.1.11 puts
and gets tensors of the same size, in memory, in its own environment (--rival; made with uv if it is not there, 5 GB),
with the same samples a call and calls in flight. Repeats alternate; a ratio is of medians, against the better of
TransferQueue with one storage unit and with two (its default).
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import multiprocessing
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import batched
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import anyio
import msgspec
import numpy as np

from kat_stream.config import BlobsSection
from kat_stream.log import Delivered, Emit, Log, broker, open_log, run_work
from tests import observe_kit as fab
from topics import Trajectory, Turn, topic_named
from topics.record import encode

PROMPT, SAMPLED, TEXT = 300, 150, 600
"""Of one turn: new prompt tokens, sampled tokens with log-probs, characters of the reply."""
RIVAL = ("transferqueue==0.1.11", "torch==2.13.0")
NEVER_S = 600.0
WORDS = np.random.default_rng(0)
IDS = (WORDS.zipf(1.2, 1 << 21) % 150_000).astype("<i4").tobytes()
NOISE = (-np.abs(WORDS.normal(0, 1, 1 << 20))).astype("<f4").tobytes()


@dataclass(frozen=True)
class Case:
    """`count` trajectories of about `size` bytes, `batch` a call, `at_once` calls in flight."""

    count: int
    size: int
    batch: int
    at_once: int


@dataclass(frozen=True)
class Place:
    """Which log: a broker, topics of its own on it, and where its large values lie (empty: on the broker)."""

    url: str
    prefix: str
    blobs: str = ""
    limit: int = 0


def _some(rng: random.Random, pool: bytes, numbers: int) -> bytes:
    first = 4 * rng.randrange(len(pool) // 4 - numbers)
    return pool[first : first + 4 * numbers]


def trajectory_of(rng: random.Random, number: int, size: int) -> Trajectory:
    """A trajectory whose message has about `size` bytes: as many turns as that takes; ids as frequent as words are."""
    asked = fab.request(f"{fab.RUN}-t{number // 8:06d}", number % 8, 8)
    first = fab.turns(asked)[0]

    def turn(index: int) -> Turn:
        return msgspec.structs.replace(
            first,
            turn_id=f"{asked.rollout_id}-{index}",
            index=index,
            prompt_ids=_some(rng, IDS, PROMPT),
            sampled_ids=_some(rng, IDS, SAMPLED),
            logprobs=_some(rng, NOISE, SAMPLED),
            content=_some(rng, IDS, TEXT // 8).hex(),
        )

    bare = msgspec.structs.replace(fab.trajectory(asked), turns=())
    turns = max(1, round((size - len(encode(bare))) / len(encode(turn(0)))))
    return msgspec.structs.replace(bare, turns=tuple(map(turn, range(turns))))


async def _opened(place: Place) -> Log:
    log = open_log(place.url, prefix=place.prefix, blobs=place.blobs, blob_limit_bytes=place.limit)
    await log.start()
    return log


async def _write(place: Place, pipe: Connection, case: Case) -> None:
    log, rng = await _opened(place), random.Random(1)
    await log.publish(trajectory_of(rng, 0, case.size))
    calls = iter(list(batched((trajectory_of(rng, number, case.size) for number in range(case.count)), case.batch)))
    gc.freeze()  # what waits to be published is the benchmark's, no stage has it
    pipe.send("ready")
    await asyncio.to_thread(pipe.recv)
    began, cpu = time.monotonic(), time.process_time()

    async def lane() -> None:
        for records in calls:
            await log.publish(*records, deadline_s=NEVER_S)

    await asyncio.gather(*(lane() for _ in range(case.at_once)))
    pipe.send((began, time.process_time() - cpu))
    await log.close()


async def _follow(place: Place, pipe: Connection, case: Case) -> None:
    log, left = await _opened(place), case.count
    async with log.follow(["trajectories"], start="latest") as follower:
        pipe.send("ready")
        cpu = time.process_time()
        async with asyncio.timeout(NEVER_S):
            while left:
                for delivered in await follower.poll(0.2):
                    assert isinstance(delivered.record(), Trajectory)
                    left -= 1
        pipe.send((time.monotonic(), time.process_time() - cpu))
    await log.close()


async def _work(place: Place, pipe: Connection, case: Case) -> None:
    """As a stage does it; the first message, which the writer sent to warm up, says that the group stands."""
    log, seen, stopping = await _opened(place), 0, anyio.Event()
    ended = cpu = 0.0

    async def handle(delivered: Delivered) -> Emit:
        nonlocal seen, ended, cpu
        assert isinstance(delivered.record(), Trajectory)
        seen += 1
        if seen == 1:
            cpu = time.process_time()
            pipe.send("ready")
        if seen == case.count + 1:
            ended, cpu = time.monotonic(), time.process_time() - cpu
            stopping.set()
        return Emit()

    async with asyncio.timeout(NEVER_S):
        await run_work(
            log, ["trajectories"], group=place.prefix, member="m", handler=handle, stopping=stopping, max_in_flight=64
        )
    pipe.send((ended, cpu))
    await log.close()


READERS = {"follow": _follow, "group": _work}
WAYS = (*READERS, "claims")


def _child(role: str, place: Place, pipe: Connection, case: Case) -> None:
    asyncio.run({"write": _write, **READERS}[role](place, pipe, case))


def ours(url: str, case: Case, way: str, limit: int) -> dict[str, float]:
    """One case in two fresh processes on topics of its own."""
    place = Place(url, f"bench{time.monotonic_ns()}.")
    if way != "claims":
        return _measured(place, case, way)
    with tempfile.TemporaryDirectory(prefix="kat-bench-") as store:
        return _measured(replace(place, blobs=f"file:{store}", limit=limit), case, "group")


def _measured(place: Place, case: Case, reader: str) -> dict[str, float]:
    asyncio.run(_make_topics(place))
    os.sync()  # what an earlier case wrote is not this one's to wait for
    context = multiprocessing.get_context("spawn")
    (to_writer, writer_end), (to_reader, reader_end) = context.Pipe(), context.Pipe()
    processes = []
    for role, end, other in (("write", writer_end, to_writer), (reader, reader_end, to_reader)):
        processes.append(context.Process(target=_child, args=(role, place, end, case), daemon=True))
        processes[-1].start()
        _recv(other)
    to_writer.send("go")
    began, writing = _recv(to_writer)
    ended, reading = _recv(to_reader)
    for process in processes:
        process.join(30)
    ms = 1e3 / case.count
    return {"a second": case.count / (ended - began), "write ms CPU": writing * ms, "read ms CPU": reading * ms}


async def _make_topics(place: Place) -> None:
    log = await _opened(place)
    await log.apply_topics([topic_named(name) for name in ("trajectories", *_tiers(), "dead.letters")])
    await log.close()


def _tiers() -> Iterable[str]:
    from kat_stream.log.retries import TIERS

    return TIERS


def _recv(pipe: Connection) -> Any:
    assert pipe.poll(NEVER_S), f"nothing from the other process within {NEVER_S:g} s"
    return pipe.recv()


class Rival:
    """TransferQueue in the process of its own interpreter."""

    def __init__(self, environment: Path) -> None:
        script = Path(__file__).with_name("log_rival.py")
        self._process = subprocess.Popen(
            [environment / "bin" / "python", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TQ_NUM_THREADS": "1"},
        )
        self._answer()

    def measure(self, case: Case) -> dict[str, float]:
        """Samples a second, by way."""
        assert self._process.stdin is not None
        print(json.dumps(asdict(case)), file=self._process.stdin, flush=True)
        rates: dict[str, float] = json.loads(self._answer())
        return rates

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _answer(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("RESULT "):
                return line.removeprefix("RESULT ")
        raise RuntimeError(f"TransferQueue ended with exit code {self._process.wait(60)}")


def make_environment(directory: Path) -> None:
    """The rival's own environment; kept for the next time."""
    if not (directory / "bin" / "python").exists():
        uv = Path(sys.executable).with_name("uv")
        subprocess.run([uv, "venv", "-q", "--python", sys.executable, directory], check=True)
        subprocess.run([uv, "pip", "install", "-q", "--python", directory / "bin" / "python", *RIVAL], check=True)


@contextmanager
def a_broker() -> Iterator[str]:
    """One real broker with fresh data, its URL."""
    with tempfile.TemporaryDirectory(prefix="kat-bench-") as directory:
        state = Path(directory)
        try:
            yield f"kafka:{broker.up(state)}"
        finally:
            broker.down(state)


def _rounds(url: str, rival: Rival | None, case: Case, repeats: int, limit: int) -> dict[str, list[float]]:
    """Each way `repeats` times in turn, after one that warms up."""
    rates: dict[str, list[float]] = {}
    for number in range(repeats + 1):
        results = {way: ours(url, case, way, limit) for way in WAYS if way != "claims" or case.size > limit}
        found = {way: result["a second"] for way, result in results.items()}
        if rival is not None:
            found |= rival.measure(case)
        print(json.dumps({"repeat": number, **results, "a second": found}), file=sys.stderr, flush=True)
        if number:
            for way, rate in found.items():
                rates.setdefault(way, []).append(rate)
    return rates


def _row(case: Case, rates: dict[str, list[float]]) -> str:
    medians = {way: statistics.median(found) for way, found in rates.items()}
    best = max((rate for way, rate in medians.items() if way not in WAYS), default=0.0)
    cells = [f"{case.size // 1000:>4} KB x {case.batch:>2} a call, {case.at_once:>2} calls"]
    for way in WAYS:
        if way in medians:
            ratio = f" ({medians[way] / best:4.2f})" if best else ""
            cells.append(f"{way} {medians[way]:6.0f}/s{ratio}")
    return "  ".join([*cells, f"TransferQueue {best:6.0f}/s" if best else ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[40_000, 300_000], help="bytes of a trajectory")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="trajectories a call")
    parser.add_argument("--at-once", type=int, default=8, help="calls in flight")
    parser.add_argument("--megabytes", type=int, default=100, help="of each case")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--limit", type=int, default=BlobsSection().limit_bytes, help="bytes over which a value is left in the store"
    )
    parser.add_argument("--rival", type=Path, default=Path("/tmp/tq/env"), help="TransferQueue's environment")
    parser.add_argument("--alone", action="store_true", help="without TransferQueue")
    args = parser.parse_args()
    if not args.alone:
        make_environment(args.rival)
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}", flush=True)
    with a_broker() as url:
        rival = None if args.alone else Rival(args.rival)
        for size in args.sizes:
            for batch in args.batches:
                count = args.megabytes * 1_000_000 // size // batch * batch
                case = Case(count, size, batch, args.at_once)
                print(_row(case, _rounds(url, rival, case, args.repeats, args.limit)), flush=True)
        if rival is not None:
            rival.close()


if __name__ == "__main__":
    main()
