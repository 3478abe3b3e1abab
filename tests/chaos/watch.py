"""What the topics say while the system is struck: how far each stage has come, seen from outside.

Invariant: progress is counted from records on the log (and from the archive's files, which are the archiver's only
word), never from what a service says of itself. A broker that is away only delays the view.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import anyio

from kat_stream.errors import LogError
from kat_stream.log import Delivered, open_log
from topics import PolicyVersion, TrainStep, Turn

log = logging.getLogger(__name__)

OUTPUT = {
    "sampler": "rollout.requests",
    "gateway": "turns",
    "engine": "turns",
    "rollout": "trajectories",
    "verifier": "rewards",
    "packer": "batches",
    "trainer": "train.steps",
    "broker": "train.steps",
    "run": "train.steps",
}
"""Where a stage's own work shows. The two that write no topic are seen elsewhere: `Watch.progress`."""
TOPICS = tuple({*OUTPUT.values(), "policy.versions"})
POLL_S = 0.05
REOPEN_S = 0.5


@dataclass(slots=True)
class Watch:
    """A follower of the run's topics; `follow` runs until cancelled."""

    url: str
    archive: Path
    seen: Counter[str] = field(default_factory=Counter)
    """Messages by topic."""
    versions: list[str] = field(default_factory=list)
    sampled: set[str] = field(default_factory=set)
    """Policy versions that turns were drawn from."""
    steps: list[TrainStep] = field(default_factory=list)
    stepped: list[float] = field(default_factory=list)
    """When (monotonic) each of them was seen."""
    _positions: dict[tuple[str, int], int] = field(default_factory=dict)

    async def follow(self) -> None:
        while True:
            try:
                await self._follow()
            except LogError as error:
                log.debug("watch: %s", error)
                await anyio.sleep(REOPEN_S)

    async def _follow(self) -> None:
        the_log = open_log(self.url)
        try:
            await the_log.start()
            async with the_log.follow(TOPICS, start=self._positions or "earliest", poll_s=POLL_S) as follower:
                async for delivered in follower:
                    self._take(delivered)
        finally:
            with anyio.CancelScope(shield=True):
                await the_log.close()

    def _take(self, delivered: Delivered) -> None:
        position = delivered.position
        self._positions[position.topic, position.partition] = position.offset + 1
        self.seen[position.topic] += 1
        if position.topic in ("turns", "policy.versions", "train.steps"):
            match delivered.record():
                case Turn(spans=spans):
                    self.sampled.update(span.version for span in spans)
                case PolicyVersion() as version:
                    self.versions.append(version.version)
                case TrainStep() as step:
                    self.steps.append(step)
                    self.stepped.append(time.monotonic())

    def progress(self, stage: str) -> Callable[[], bool]:
        """Whether the stage has done something new since now."""
        if stage == "archiver":
            before = self._archived()
            return lambda: bool(self._archived() - before)
        if stage == "weight_sync":
            known = set(self.versions)
            return lambda: bool(self.sampled - known)
        topic = OUTPUT[stage]
        count = self.seen[topic]
        return lambda: self.seen[topic] > count

    def longest_silence(self, since: float) -> float:
        """Seconds without an optimizer step, from `since` (monotonic) to the newest one."""
        heard = [since, *(at for at in self.stepped if at > since)]
        return max(after - before for before, after in pairwise(heard))

    def _archived(self) -> set[tuple[str, int]]:
        return {(path.name, path.stat().st_ino) for path in self.archive.rglob("*.parquet")}
