"""How many agents of each kind this machine runs at once, and what bounds it.

    python -m tests.benchmarks.agents [--scaffolds codex mini-swe-agent] [--out rows.json]

Each rollout is the one of `scaffolds check`: the unmodified program in a sandbox without a network, the real gateway, a
scripted policy that answers at once. 1, 2, 4, 8 and 16 at once do two rollouts each, until the rate no longer rises by
5 % or twice as many would hold more than 60 % of the machine's memory. CPU, memory and tasks (processes and threads)
are a sandbox's, by its control groups and what its processes used, page cache included; `ours` is the CPU of this
process: gateway, scripted engine and worker. The cores that are busy count everybody, so run it alone. A further call
is what each of twenty more turns costs, and the memory that it comes to: by it, how many do 60 % of the machine while a
model takes its time (a call every 20 s, 45 a rollout). Rows of other agents that are in --out stay.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from kat_stream.env.rollout import RolloutRunner
from kat_stream.env.sandboxes.base import Sandbox
from kat_stream.env.sandboxes.bwrap import BwrapBackend
from kat_stream.env.sandboxes.cgroups import Hierarchy
from kat_stream.env.scaffolds.check import AGENT_S, checkable
from kat_stream.env.scaffolds.description import Step
from kat_stream.env.scaffolds.registry import installed_agents
from kat_stream.env.scaffolds.rehearsal import playing, request_for, stage, task_in
from kat_stream.env.scaffolds.watching import Watching
from topics import Sampling, Trajectory

AT_ONCE = (1, 2, 4, 8, 16)
ROUNDS = 2
FURTHER = 20
RISE = 1.05
SHARE = 0.6
"""Of the machine's memory and cores that is planned to be used."""
CALLS, CALL_S = 45, 20.0
"""Of a rollout, and from one to the next: the workload of docs/scale.md."""
BUSY = 0.85
"""Of the cores, or of the one core that this process can use: a bound."""
TICKS = os.sysconf("SC_CLK_TCK")
SAMPLING = Sampling(max_turns=4 + FURTHER, max_new_tokens=2048, max_context=400_000)
CORES = os.cpu_count() or 1
MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@dataclass
class Row:
    """`at_once` agents of one kind; seconds and CPU seconds are a rollout's."""

    agent: str
    at_once: int
    wall_s: float
    per_min: float
    cpu_s: float
    ours_s: float
    busy: float
    """Cores."""
    memory_mb: float
    tasks: int
    failed: int
    further_cpu_s: float = 0.0
    further_mb: float = 0.0
    bound: str = ""


class Usage:
    """What sandboxes have used, asked of each before it ends."""

    def __init__(self, groups: Hierarchy) -> None:
        self.cpu_s, self.tasks = 0.0, 0
        self._groups = groups

    async def ask(self, sandbox: Sandbox) -> None:
        group = self._groups.open(sandbox.id)
        self.cpu_s += sum(map(cpu_seconds, group.processes()))
        for directory in group.directories:
            if (peak := directory / "pids.peak").exists():
                self.tasks = max(self.tasks, int(peak.read_text()))


def cpu_seconds(pid: int) -> float:
    """Of a process and of all its children that have ended; 0 if it is gone."""
    with suppress(FileNotFoundError, ProcessLookupError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / TICKS
    return 0.0


def clocks() -> tuple[float, float, float]:
    """Wall seconds, CPU seconds of the whole machine, CPU seconds of this process."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    # user, nice, system, and the two of interrupts; not idle, waiting for a disk, taken by another virtual machine.
    used = sum(ticks[i] for i in (0, 1, 2, 5, 6)) / TICKS
    return time.monotonic(), used, time.process_time()


def longer(steps: Sequence[Step], calls: int) -> list[Step]:
    """The script with that many more of its first call, none like another: agents stop where one is repeated."""
    more = [
        msgspec.structs.replace(
            steps[0], arguments=json.loads(json.dumps(steps[0].arguments).replace("answer.txt", f"answer.txt; : {k}"))
        )
        for k in range(calls)
    ]
    return [*more, *steps]


async def measure(agent: str, at_once: int, rollouts: int, further: int = 0) -> Row:
    """`rollouts` of them, `at_once` at a time."""
    groups = Hierarchy.detect()
    if groups is None:
        raise SystemExit("no control groups here (or not root): what a sandbox uses cannot be told")
    steps = longer(checkable(agent).description.check.steps, further)
    usage, inner = Usage(groups), BwrapBackend()
    sandboxes: Any = Watching(inner, usage.ask)
    gate = asyncio.Semaphore(at_once)
    try:
        with tempfile.TemporaryDirectory(prefix="kat-agents-") as directory:
            task = task_in(Path(directory), agent, AGENT_S)
            async with stage(playing(steps)) as world:
                runner = RolloutRunner(sandboxes, world.control, world.data_url)

                async def one(sample: int) -> Trajectory:
                    async with gate:
                        return await runner.run(request_for(task, SAMPLING, sample))

                before = clocks()
                ended = await asyncio.gather(*map(one, range(rollouts)))
                seconds, used, ours = (now - then for now, then in zip(clocks(), before, strict=True))
                await runner.close()
    finally:
        await inner.close()
    return Row(
        agent=agent,
        at_once=at_once,
        wall_s=median(done.seconds for done in ended),
        per_min=60.0 * rollouts / seconds,
        cpu_s=usage.cpu_s / rollouts,
        ours_s=ours / rollouts,
        busy=used / seconds,
        memory_mb=sandboxes.memory_bytes / 2**20,
        tasks=usage.tasks,
        failed=sum(done.outcome != "submitted" or len(done.turns) < len(steps) for done in ended),
    )


async def sweep(agent: str) -> list[Row]:
    """More and more at once, until that no longer pays."""
    await measure(agent, 1, 1)  # files come into the page cache
    rows: list[Row] = []
    for at_once in AT_ONCE:
        rows.append(await measure(agent, at_once, ROUNDS * at_once))
        print(shown(rows[-1]), flush=True)
        if len(rows) > 1 and rows[-1].per_min < RISE * rows[-2].per_min:
            break
        if would_hold(rows[-1]) > SHARE * MEMORY:
            break
    rows[-1].bound = bound(rows[-1])
    if checkable(agent).description.check.steps[0].tool:
        more = await measure(agent, 1, 1, FURTHER)
        if not more.failed:
            rows[0].further_cpu_s, rows[0].further_mb = (more.cpu_s - rows[0].cpu_s) / FURTHER, more.memory_mb
            rows[0].bound = fit(rows[0])
    return rows


def would_hold(row: Row) -> float:
    """Bytes, at most, of twice as many."""
    return 2 * row.at_once * row.memory_mb * 2**20


def fit(row: Row) -> str:
    """How many at once, by the cost of one, where the model is slow and not the machine."""
    cores = (row.cpu_s + CALLS * row.further_cpu_s) / (CALLS * CALL_S)
    by_memory = SHARE * MEMORY / 2**20 / row.further_mb
    return f"at a call every {CALL_S:.0f} s: {SHARE * CORES / cores:.0f} fit by CPU, {by_memory:.0f} by memory"


def bound(row: Row) -> str:
    """What keeps more of them from doing more, by the row's own figures."""
    ours, all_s = row.ours_s * row.per_min / 60.0, row.cpu_s + row.ours_s
    if ours > BUSY:
        return f"this process: {ours:.2f} of the one core it can use"
    if row.busy > BUSY * CORES:
        return f"CPU: {row.busy:.2f} of {CORES} cores; 60 x {CORES} / {all_s:.2f} s = {60 * CORES / all_s:.0f} a minute"
    if would_hold(row) > SHARE * MEMORY:
        return f"memory: {2 * row.at_once} x {row.memory_mb:.0f} MB > {SHARE:.0%} of {MEMORY / 2**30:.0f} GB"
    waits = row.wall_s - row.cpu_s
    return f"its own waits: {row.busy:.2f} of {CORES} cores, {waits:.1f} of {row.wall_s:.1f} s without CPU"


def shown(row: Row) -> str:
    wall = f"{row.wall_s:.1f}" + (f" ({row.failed} failed)" if row.failed else "")
    further = f"{row.further_cpu_s:.2f} ({row.further_mb:.0f} MB)" if row.further_mb else ""
    words = [row.agent, row.at_once, wall, f"{row.per_min:.1f}", f"{row.cpu_s:.2f}", f"{row.ours_s:.2f}", further]
    words += [f"{row.busy:.2f}", f"{row.memory_mb:.0f}", row.tasks, row.bound]
    return f"| {' | '.join(map(str, words))} |"


def table(rows: Sequence[Row]) -> str:
    columns = "agent, at once, wall s, rollouts/min, CPU s, ours, a further call, cores busy, memory MB, tasks, bound"
    names = columns.split(", ")
    return "\n".join([f"| {' | '.join(names)} |", "|---" * len(names) + "|", *map(shown, rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scaffolds", nargs="+", default=installed_agents())
    parser.add_argument("--out", type=Path, help="JSON file of all rows")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    print(f"{platform.machine()}, {CORES} cores, {MEMORY / 2**30:.0f} GB, load {load:.1f}, {time.strftime('%F')}\n")
    kept = [Row(**row) for row in json.loads(args.out.read_text())] if args.out and args.out.exists() else []
    for agent in args.scaffolds:
        kept = [*(row for row in kept if row.agent != agent), *asyncio.run(sweep(agent))]
        if args.out:
            args.out.write_text(json.dumps([asdict(row) for row in kept], indent=1) + "\n")
    print("\n" + table(kept))


if __name__ == "__main__":
    main()
