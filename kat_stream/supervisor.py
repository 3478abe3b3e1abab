"""A whole run as OS processes, one a service: starts them, restarts what dies, says so, and stops them in order.

Invariant: a death is never silent. A service that dies is started again after a growing pause; one that dies again and
again stops the run with the last lines of its log. The end of the sampler is the end of the run.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import anyio
from anyio.abc import Process

from kat_stream.errors import ServiceDied
from kat_stream.signals import SUPERVISOR

log = logging.getLogger(__name__)

PROCESSES = (
    "archiver",
    "trainer",
    "engine",
    "gateway",
    "weight_sync",
    "packer",
    "verifier-1",
    "rollout-1",
    "rollout-2",
    "sampler",
)
"""Members in the order in which they start; the name before the dash is the service."""
BACKOFF_S = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
DEATHS, WITHIN_S = 6, 60.0
"""So many deaths of one member within this time stop the run."""
HURRY_S, FINISH_S = 2.2, 30.0
"""How long services may take to stop, twice: after Ctrl-C (under 5 s), and at the end of the schedule."""
LOG_TAIL = 15


@dataclass(slots=True)
class Member:
    """One service process and its history."""

    name: str
    run_dir: Path
    process: Process | None = None
    deaths: deque[float] = field(default_factory=lambda: deque(maxlen=DEATHS))
    stopping: bool = False
    finished: bool = False
    """The sampler: its schedule is done."""

    @property
    def service(self) -> str:
        return self.name.partition("-")[0]

    @property
    def log_file(self) -> Path:
        return self.run_dir / "logs" / f"{self.name}.log"

    async def start(self) -> Process:
        command = [sys.executable, "-m", "kat_stream.cli", "serve", self.service]
        command += ["--run", str(self.run_dir), "--member", self.name]
        self.log_file.parent.mkdir(exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment[SUPERVISOR] = str(os.getpid())
        with self.log_file.open("ab") as out:
            self.process = await anyio.open_process(
                command, stdin=None, stdout=out, stderr=out, env=environment, start_new_session=True
            )
        return self.process

    def died_too_often(self) -> bool:
        return len(self.deaths) == DEATHS and self.deaths[-1] - self.deaths[0] < WITHIN_S

    def last_words(self) -> str:
        lines = self.log_file.read_text(errors="replace").splitlines() if self.log_file.exists() else []
        return "\n".join(f"    {line}" for line in lines[-LOG_TAIL:])


async def supervise(run_dir: Path, stopping: anyio.Event, members: Sequence[str] = PROCESSES) -> None:
    """Run all members until the sampler is finished or `stopping` is set; raises ServiceDied if one cannot live."""
    all_members = [Member(name, run_dir) for name in members]
    failures: list[ServiceDied] = []
    async with anyio.create_task_group() as group:
        for member in all_members:
            group.start_soon(_keep_alive, member, stopping, failures)
        await stopping.wait()
        with anyio.CancelScope(shield=True):
            await _stop(all_members, FINISH_S if any(member.finished for member in all_members) else HURRY_S)
        group.cancel_scope.cancel()
    if failures:
        raise failures[0]


async def _keep_alive(member: Member, stopping: anyio.Event, failures: list[ServiceDied]) -> None:
    while not stopping.is_set():
        process = await member.start()
        code = await process.wait()
        if member.stopping or stopping.is_set():
            return
        if code == 0 and member.service == "sampler":
            log.info("the schedule is done")
            member.finished = True
            stopping.set()
            return
        member.deaths.append(time.monotonic())
        log.error("%s died (%s); its log: %s", member.name, _how(code), member.log_file)
        if member.died_too_often():
            reason = (
                f"{member.name} died {DEATHS} times within {WITHIN_S:g} s, last {_how(code)}:\n{member.last_words()}"
            )
            failures.append(ServiceDied(reason))
            stopping.set()
            return
        await anyio.sleep(BACKOFF_S[min(len(member.deaths), len(BACKOFF_S)) - 1])


async def _stop(members: Sequence[Member], within_s: float) -> None:
    """SIGTERM to all, last to the archiver, which still writes down what the others said; SIGKILL to what stays."""
    for member in members:
        member.stopping = True
    await _terminate([member for member in members if member.service != "archiver"], within_s)
    await _terminate([member for member in members if member.service == "archiver"], within_s)


async def _terminate(members: Sequence[Member], within_s: float) -> None:
    for member in members:
        _signal(member, signal.SIGTERM)
    with anyio.move_on_after(within_s):
        for member in members:
            if member.process is not None:
                await member.process.wait()
    for member in members:
        _signal(member, signal.SIGKILL)


def _signal(member: Member, number: signal.Signals) -> None:
    if member.process is not None and member.process.returncode is None:
        member.process.send_signal(number)


def _how(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"
