"""A run of the suite: start, strike, wait until the system went on, settle, account.

Invariant: the next blow falls only after the system has made an optimizer step since the last recovery; the verdict
comes from the topics alone (tests/chaos/account.py) after everything that was asked for before the last fault was over
has found its end, and every stage has spoken once more.
"""

from __future__ import annotations

import logging
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import anyio

from kat_stream.errors import KatError
from kat_stream.log import Delivered, open_log
from kat_stream.observe.ledger import Ledger
from tests.chaos.account import Account, Verdict
from tests.chaos.faults import BLOWS, RECOVER_S, STAGES, World
from tests.chaos.system import System
from tests.chaos.watch import Watch
from tests.waiting import until
from topics import CATALOGUE

PAUSE_S = (0.2, 3.0)
"""Between two blows, so that they fall at random moments."""
SETTLE_S = 240.0
OPERATOR_S = 0.3
Told = Callable[[str, float], None]


@dataclass(slots=True)
class Outcome:
    """What was done and how it ended."""

    recoveries: list[tuple[str, float]] = field(default_factory=list)
    stuck: list[str] = field(default_factory=list)
    verdict: Verdict = field(default_factory=Verdict)
    judged: bool = False

    @property
    def ok(self) -> bool:
        return self.judged and not self.stuck and self.verdict.ok

    def lines(self) -> list[str]:
        """What went wrong, the closing line, and the table by kind."""
        problems = [f"  problem: {problem}" for problem in (*self.stuck, *self.verdict.problems())]
        return [*problems, self.closing(), *table(self.recoveries)]

    def newest(self) -> str:
        kind, seconds = self.recoveries[-1]
        return f"{kind}: went on after {seconds:.1f} s"

    def closing(self) -> str:
        recoveries = [seconds for _, seconds in self.recoveries] or [float("nan")]
        verdict = self.verdict
        return (
            f"chaos: {len(self.recoveries)} faults, lost {len(verdict.lost)}, trained twice {len(verdict.twice)}, "
            f"ledger {'exact' if verdict.exact else 'WRONG'}, "
            f"recovery p50 {percentile(recoveries, 50):.1f} p99 {percentile(recoveries, 99):.1f} s"
        )


def table(recoveries: Sequence[tuple[str, float]]) -> list[str]:
    """Recovery by kind."""
    by_kind: dict[str, list[float]] = defaultdict(list)
    for kind, seconds in recoveries:
        by_kind[kind].append(seconds)
    lines = [f"  {'kind':24} {'n':>4} {'p50 s':>7} {'max s':>7}"]
    for kind, times in sorted(by_kind.items()):
        lines.append(f"  {kind:24} {len(times):4} {percentile(times, 50):7.1f} {max(times):7.1f}")
    return lines


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest value that so many percent do not exceed."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, -(-len(ranked) * percent // 100) - 1)]


async def run_suite(faults: Sequence[str], seed: int, minutes: float, system: System, told: Told) -> Outcome:
    """Strike a fresh system with these kinds, or until the minutes are over; `told` hears each recovery."""
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # a broker that is away is what this is about
    outcome = Outcome()
    try:
        await anyio.to_thread.run_sync(system.start)
        watch = Watch(system.url, system.run_dir / "archive")
        world = World(system, watch, random.Random(seed))
        async with anyio.create_task_group() as group:
            group.start_soon(watch.follow)
            group.start_soon(_operate, world)
            await until(lambda: len(watch.steps) >= 2, "the first steps", RECOVER_S)
            began, end = time.monotonic(), time.monotonic() + 60 * minutes
            for number, kind in enumerate(faults, 1):
                if time.monotonic() > end or not await _one(world, outcome, kind, told):
                    break
                print(f"[{time.monotonic() - began:6.0f} s] {number}/{len(faults)} {outcome.newest()}", flush=True)
            outcome.verdict, outcome.judged = await _account(world, outcome), True
            group.cancel_scope.cancel()
    finally:
        with anyio.CancelScope(shield=True):
            if not outcome.ok and system.run_dir.exists():
                print(f"evidence: {system.keep_evidence()}", flush=True)
            await anyio.to_thread.run_sync(system.close)
    return outcome


async def _one(world: World, outcome: Outcome, kind: str, told: Told) -> bool:
    """One blow; False if the system did not go on."""
    await anyio.sleep(world.chance.uniform(*PAUSE_S))
    blow, stage = BLOWS[kind]
    try:
        seconds = await blow(world, stage)
        outcome.recoveries.append((kind, seconds))
        await until(world.watch.progress("trainer"), "the next optimizer step", RECOVER_S)
        told(kind, seconds)
    except (TimeoutError, OSError, KatError) as error:
        outcome.stuck.append(f"{kind}: {type(error).__name__}: {error}")
    if not world.system.running():
        outcome.stuck.append(f"{kind}: the run has ended: {world.system.last_words()}")
    return not outcome.stuck


async def _operate(world: World) -> None:
    """The broker's own supervisor, which every production broker has."""
    while True:
        if world.broker_may_run:
            await anyio.to_thread.run_sync(world.system.mend_broker)
        await anyio.sleep(OPERATOR_S)


async def _account(world: World, outcome: Outcome) -> Verdict:
    """Let everything asked for until now end and every stage speak; then stop the run and read the topics."""
    spoken = {stage: world.watch.progress(stage) for stage in STAGES}
    asked = Account.of(await read_all(world.system.url)).asked
    print(f"settling: {len(asked)} rollouts were asked for", flush=True)
    account = Account()
    with anyio.move_on_after(SETTLE_S):
        while not outcome.stuck:
            account = Account.of(await read_all(world.system.url))
            if not account.open_of(asked) and all(said() for said in spoken.values()):
                break
            await anyio.sleep(1)
    silent = [stage for stage, said in spoken.items() if not said()]
    outcome.stuck += [f"{stage} said nothing more after the last fault" for stage in silent]
    await anyio.to_thread.run_sync(world.system.stop_run)
    delivered = await read_all(world.system.url)
    ledger = Ledger()
    for message in delivered:
        ledger.apply(message.record())
    return Account.of(delivered).judge(asked, ledger.fates())


async def read_all(url: str) -> list[Delivered]:
    """Every message of every topic, partition by partition in the order of offsets."""
    the_log = open_log(url)
    await the_log.start()
    try:
        async with the_log.follow([topic.name for topic in CATALOGUE]) as follower:
            return [delivered async for delivered in follower.catch_up(SETTLE_S)]
    finally:
        await the_log.close()


def fresh_directory() -> Path:
    return Path(tempfile.mkdtemp(prefix="kat-chaos-"))
