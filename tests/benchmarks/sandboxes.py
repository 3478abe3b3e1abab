"""Sandboxes: latency of create, exec, put and destroy, and CPU time of one sandbox's life, as a table.

Run: `.venv/bin/python tests/benchmarks/sandboxes.py [--count 40]` from the root of the checkout. CPU time counts
this process and all it started, so that it holds on a busy machine too.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import resource
import statistics
import time
from collections.abc import Awaitable, Callable

from kat_stream.env.sandboxes import SandboxBackend, SandboxSpec, get_sandbox

EXECS = 10
PHASES = ("create", "exec first", "exec next", "put", "read_file", "destroy")


def cpu_seconds() -> float:
    usages = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


async def timed(samples: list[float], call: Callable[[], Awaitable[object]]) -> None:
    begin = time.perf_counter()
    await call()
    samples.append(1e3 * (time.perf_counter() - begin))


async def life(backend: SandboxBackend, samples: dict[str, list[float]], execs: int) -> None:
    begin = time.perf_counter()
    sandbox = await backend.create(SandboxSpec())
    samples["create"].append(1e3 * (time.perf_counter() - begin))
    await timed(samples["exec first"], lambda: sandbox.exec("true", timeout_s=30))
    for _ in range(execs):
        await timed(samples["exec next"], lambda: sandbox.exec("true", timeout_s=30))
    if execs:
        await timed(samples["put"], lambda: sandbox.put({"a/b": (b"x" * 4096, 0o644)}, "/work"))
        await timed(samples["read_file"], lambda: sandbox.read_file("/work/a/b", 1 << 20))
    await timed(samples["destroy"], sandbox.destroy)


async def measure(name: str, concurrency: int, count: int, execs: int) -> tuple[dict[str, list[float]], float, float]:
    """(samples in ms by phase, CPU ms of a life, lives a second)."""
    backend = get_sandbox(name, allow_unsafe=True)
    samples: dict[str, list[float]] = {phase: [] for phase in PHASES}
    try:
        await life(backend, {phase: [] for phase in PHASES}, execs)
        gate = asyncio.Semaphore(concurrency)

        async def one() -> None:
            async with gate:
                await life(backend, samples, execs)

        began, used = time.perf_counter(), cpu_seconds()
        await asyncio.gather(*(one() for _ in range(count)))
        return samples, 1e3 * (cpu_seconds() - used) / count, count / (time.perf_counter() - began)
    finally:
        await backend.close()


def row(name: str, concurrency: int, phase: str, values: list[float]) -> str:
    ordered = sorted(values)
    tail = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return f"| {name} | {concurrency} | {phase} | {statistics.median(ordered):.1f} | {tail:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=40, help="sandboxes per row")
    count = parser.parse_args().count
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, n = {count}\n")
    print("| back end | concurrency | phase | p50 ms | p99 ms |\n|---|---|---|---|---|")
    notes = []
    for name in ("bwrap", "local"):
        for concurrency in (1, 4):
            samples, _, _ = asyncio.run(measure(name, concurrency, count, EXECS))
            print("\n".join(row(name, concurrency, phase, samples[phase]) for phase in PHASES))
            _, bare, rate = asyncio.run(measure(name, concurrency, count, 0))
            work = "create, one command, destroy"
            notes.append(f"{name} at {concurrency}: {bare:.1f} CPU ms for {work}; {rate:.0f} a second")
    print("\n" + "\n".join(notes))


if __name__ == "__main__":
    main()
