"""What can be done to a running system, and how long it then takes to go on by itself.

A kind is `blow:target`. Every blow returns seconds of recovery, counted from the moment its cause was gone (a kill: at
once; a frozen process: when it may run again; a full disk: when there is room; a cut: when it is healed) until the
struck stage's own next word on the topics, spoken by a process that lives. Invariant: a blow leaves nothing behind but
its consequences: whatever it froze, filled or cut is released even when the suite is stopped in the middle.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import anyio

from kat_stream.supervisor import PROCESSES
from tests.chaos.system import System, cut, heal_cuts
from tests.chaos.watch import Watch
from tests.waiting import until

RECOVER_S = 180.0
"""Longest recovery: a system that needs more has not gone on by itself."""
AIM_S = 60.0
FREEZE_S = (7.0, 11.0)
"""Longer than a member's session (6 s), so that its partitions move and it comes back as a zombie."""
BROKER_FREEZE_S = (5.0, 40.0)
"""Longer than a broker's session (3 s of three, 1 s of one), and than clients wait for an answer (7 s)."""
FULL_S = 8.0
LOOK_S = 0.02
SEEN_S = 0.4
"""How long the watch may need to see a record that was published."""
STAGES = ("sampler", "gateway", "engine", "rollout", "verifier", "packer", "trainer", "weight_sync", "archiver")


@dataclass(slots=True)
class World:
    """Everything a blow needs."""

    system: System
    watch: Watch
    chance: random.Random
    broker_may_run: bool = True

    def member_of(self, stage: str) -> str:
        return self.chance.choice([name for name in PROCESSES if name.partition("-")[0] == stage])

    def any_broker(self) -> int:
        return self.chance.choice([pid for pid in self.system.broker_pids() if pid])


Blow = Callable[[World, str], Awaitable[float]]


async def _kill(world: World, stage: str) -> float:
    member = world.member_of(stage)
    return await _after_death(world, stage, member, _struck(world, member, signal.SIGKILL))


async def _hang(world: World, stage: str) -> float:
    """Stopped for good: only the supervisor can end this."""
    member = world.member_of(stage)
    return await _after_death(world, stage, member, _struck(world, member, signal.SIGSTOP))


def _struck(world: World, member: str, number: signal.Signals) -> int:
    pid = world.system.pid(member)
    os.kill(pid, number)
    return pid


async def _after_death(world: World, stage: str, member: str, pid: int) -> float:
    began = time.monotonic()
    await until(lambda: world.system.pid(member) not in (0, pid), f"{member} to start again", RECOVER_S)
    await until(world.watch.progress(stage), f"a word of {member}", RECOVER_S)
    return time.monotonic() - began


async def _freeze(world: World, stage: str) -> float:
    """Stop the world for longer than the session: the others take over, then a zombie wakes."""
    pid = _struck(world, world.member_of(stage), signal.SIGSTOP)
    try:
        await anyio.sleep(world.chance.uniform(*FREEZE_S))
    finally:
        os.kill(pid, signal.SIGCONT)
    return await _spoken(world, stage)


async def _spoken(world: World, stage: str) -> float:
    began = time.monotonic()
    await until(world.watch.progress(stage), f"a word of {stage}", RECOVER_S)
    return time.monotonic() - began


async def _cut(world: World, stage: str) -> float:
    """No byte from one service to the broker."""
    pid = world.system.pid(world.member_of(stage))
    ports = {int(address.rpartition(":")[2]) for address in world.system.bootstrap.split(",")}
    heal_at = time.monotonic() + world.chance.uniform(*FREEZE_S)
    known: set[int] = set()
    try:
        while time.monotonic() < heal_at:
            await anyio.to_thread.run_sync(cut, pid, ports, known)
            await anyio.sleep(0.1)
    finally:
        heal_cuts()
    return await _spoken(world, stage)


async def _disk(world: World, where: str) -> float:
    """Not a byte left for a while. A broker that ends itself then is started again when there is room."""
    disk = world.system.disks[where]
    world.broker_may_run = where != "broker"
    disk.fill()
    try:
        await anyio.sleep(FULL_S)
    finally:
        disk.free()
        world.broker_may_run = True
    return await _spoken(world, where)


async def _kill_broker(world: World, _stage: str) -> float:
    os.kill(world.any_broker(), signal.SIGKILL)
    return await _spoken(world, "broker")


async def _freeze_broker(world: World, stage: str) -> float:
    """Two others go on without it: no pause since the blow may be long. One alone is the whole log."""
    pid, began = world.any_broker(), time.monotonic()
    os.kill(pid, signal.SIGSTOP)
    try:
        await anyio.sleep(world.chance.uniform(*BROKER_FREEZE_S))
    finally:
        os.kill(pid, signal.SIGCONT)
    after = await _spoken(world, stage)
    return after if world.system.brokers == 1 else world.watch.longest_silence(began)


async def _kill_announced(world: World, stage: str) -> float:
    """A step that is on the log and in no checkpoint."""

    async def there() -> bool:
        await until(world.watch.progress(stage), "a step", AIM_S)
        return True

    def aimed() -> bool:
        step = world.watch.steps[-1]
        return not (world.system.run_dir / "checkpoints" / f"step-{step.step:06d}.{step.lineage}").exists()

    return await _kill_at(world, stage, there, aimed)


async def _kill_at_weights(world: World, stage: str) -> float:
    """Weights that are written and not announced."""
    folder = world.system.run_dir / "weights"

    async def there() -> bool:
        known = {path.name for path in folder.iterdir()}
        await until(lambda: _names(folder) - known, "new weights", AIM_S)
        return True

    def aimed() -> bool:
        return bool(_names(folder) - set(world.watch.versions))

    return await _kill_at(world, stage, there, aimed)


def _names(folder: os.PathLike[str]) -> set[str]:
    return {name for name in os.listdir(folder) if not name.startswith(".")}  # noqa: PTH208


async def _kill_at(world: World, stage: str, there: Callable[[], Awaitable[bool]], aimed: Callable[[], bool]) -> float:
    """Stop the trainer when it may be at the point, look, and kill it there; else let it go on and try again."""
    give_up = time.monotonic() + AIM_S
    while time.monotonic() < give_up:
        await there()
        pid = _struck(world, stage, signal.SIGSTOP)
        await anyio.sleep(SEEN_S)
        if aimed():
            os.kill(pid, signal.SIGKILL)
            return await _after_death(world, stage, stage, pid)
        os.kill(pid, signal.SIGCONT)
    raise TimeoutError(f"{stage} was never met at the point where it was to be killed within {AIM_S:g} s")


BLOWS: dict[str, tuple[Blow, str]] = {
    **{f"kill:{stage}": (_kill, stage) for stage in STAGES},
    "kill:trainer@announced": (_kill_announced, "trainer"),
    "kill:trainer@weights": (_kill_at_weights, "trainer"),
    "kill:broker": (_kill_broker, "broker"),
    **{f"freeze:{stage}": (_freeze, stage) for stage in STAGES},
    "freeze:broker": (_freeze_broker, "broker"),
    **{f"hang:{stage}": (_hang, stage) for stage in ("rollout", "packer", "trainer", "gateway")},
    **{f"cut:{stage}": (_cut, stage) for stage in STAGES if stage != "engine"},
    "disk:broker": (_disk, "broker"),
    "disk:run": (_disk, "run"),
}
"""Kind -> what is done, and to whom. The engine talks to the broker only when it starts: there is nothing to cut."""


def draw(count: int, chance: random.Random, kinds: list[str]) -> list[str]:
    """So many kinds in random order, each as often as any other."""
    drawn: list[str] = []
    while len(drawn) < count:
        drawn += chance.sample(kinds, len(kinds))
    return drawn[:count]
