"""Patches: latency of laying a work tree out, taking an agent's patch and applying it, and CPU time of all that.

Run: `.venv/bin/python tests/benchmarks/patches.py [--count 40]` from the root of the checkout. The agent appends a line
to one file and makes another, the tests are one command. CPU time counts this process and all it started, two sandboxes
included: what a rollout without a model costs.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import resource
import statistics
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field

from kat_stream.env.datasets import Files
from kat_stream.env.sandboxes import SandboxBackend, get_sandbox
from kat_stream.env.trajectories import apply_patch, lay_out, sandbox_spec, take_patch
from kat_stream.env.verifiers import get_verifier
from topics import Environment, Task, VerifierSpec

BACK_ENDS = ("bwrap", "local")
SIZES = {30: 40, 5000: 3}
"""Files of the work tree: how many rollouts, by default."""
TESTS: dict[str, Files] = {
    "command": {"check.sh": (b"grep -q done new.txt\n", 0o644)},
    "harbor": {"test.sh": (b"#!/bin/sh\ngrep -c done new.txt > /logs/verifier/reward.txt\n", 0o755)},
}
LINE = b"def work(alpha: int, beta: int) -> int:  # %d of %d\n"


@dataclass
class Samples:
    """Milliseconds of each phase, and of CPU for each rollout."""

    phases: dict[str, list[float]] = field(default_factory=dict)
    cpu: float = 0.0

    async def timed[T](self, phase: str, call: Awaitable[T]) -> T:
        begin = time.perf_counter()
        result = await call
        self.phases.setdefault(phase, []).append(1e3 * (time.perf_counter() - begin))
        return result


def cpu_seconds() -> float:
    usages = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def work_tree(size: int) -> Files:
    """So many files of some 3 KB, fifty to a directory; no two are the same."""
    return {
        f"package_{n // 50}/module_{n}.py": (b"".join(LINE % (n, row) for row in range(60)), 0o644) for n in range(size)
    }


def task_of(verifier: str) -> Task:
    spec = VerifierSpec(name=verifier, tests="", timeout_s=60.0, command='sh "$TESTS/check.sh"')
    environment = Environment(files="", disk_mb=256)
    return Task(run="", task_id="t", dataset="", environment=environment, instruction="", verifier=spec)


async def rollout(backend: SandboxBackend, task: Task, files: Files, samples: Samples) -> None:
    async with await backend.create(sandbox_spec(task, wall_s=300.0)) as sandbox:
        await samples.timed("lay_out", lay_out(sandbox, task, files))
        await sandbox.exec("echo line >> package_0/module_7.py; echo done > new.txt", timeout_s=30)
        patch = await samples.timed("take_patch", take_patch(sandbox, task, files))
    async with await backend.create(sandbox_spec(task, wall_s=300.0)) as sandbox:
        await samples.timed("put", sandbox.put(files, task.environment.workdir))
        assert not await samples.timed("apply_patch", apply_patch(sandbox, task, patch.content))
        name = task.verifier.name
        verdict = await samples.timed(f"grade ({name})", get_verifier(name).grade(task, TESTS[name], sandbox))
        assert verdict.score == 1.0, verdict


async def measure(name: str, verifier: str, size: int, count: int) -> Samples:
    backend = get_sandbox(name, allow_unsafe=True)
    task, files, samples = task_of(verifier), work_tree(size), Samples()
    try:
        await rollout(backend, task, files, Samples())
        used = cpu_seconds()
        for _ in range(count):
            await rollout(backend, task, files, samples)
        samples.cpu = 1e3 * (cpu_seconds() - used) / count
        return samples
    finally:
        await backend.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, help="rollouts per row")
    count = parser.parse_args().count
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    print("| back end | verifier | files | n | phase | p50 ms | min ms |\n|---|---|---|---|---|---|---|")
    notes = []
    for name in BACK_ENDS:
        # A harbor task names /tests and /logs as they are in a sandbox with a root of its own.
        for verifier in ("command", "harbor") if name == "bwrap" else ("command",):
            for size, usual in SIZES.items():
                samples = asyncio.run(measure(name, verifier, size, count or usual))
                for phase, values in samples.phases.items():
                    row = f"| {name} | {verifier} | {size} | {count or usual} | {phase} |"
                    print(f"{row} {statistics.median(values):.1f} | {min(values):.1f} |")
                notes.append(f"{name}, {verifier}, {size} files: {samples.cpu:.1f} CPU ms a rollout")
    print("\n" + "\n".join(notes))


if __name__ == "__main__":
    main()
