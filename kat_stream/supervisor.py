"""A whole run as OS processes, one a service: starts them, restarts what dies or hangs, says so, stops them in order.

Invariant: a death is never silent: log, terminal and metric name it. A service that dies is started again after a
growing pause; one that dies again and again, quickly or slowly, stops the run with the last lines of its log, while
one that ends because something outside is away (exit code AWAY: the broker) is given much longer. A service whose event
loop does not beat (kat_stream.signals) is killed, and that is its own fault unless somebody has stopped it (SIGSTOP).
A sampler that says that its schedule is done (exit code DONE) ends the run; one that was only asked to stop is started
again like any other.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import anyio
from anyio.abc import Process

from kat_stream import telemetry
from kat_stream.config import Config
from kat_stream.errors import ServiceDied
from kat_stream.signals import AWAY, DONE, HEART, SUPERVISOR

log = logging.getLogger(__name__)

SCORER = "scorer"
"""Takes part only where the configuration asks for one."""
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
HURRY_S, FINISH_S = 2.2, 30.0
"""How long services may take to stop, twice: after Ctrl-C (under 5 s), and at the end of the schedule."""
LOG_TAIL = 15
FROM_OUTSIDE = (0, AWAY, -signal.SIGTERM, -signal.SIGKILL)
"""Asked to stop, something away, killed by somebody or for want of memory."""


@dataclass(frozen=True, slots=True)
class Patience:
    """What a member is allowed."""

    backoff_s: tuple[float, ...] = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
    """Pause before the next start, by how many lives in a row were short."""
    deaths: int = 6
    within_s: float = 60.0
    """So many deaths of one member within this time stop the run."""
    failures: int = 10
    """So many deaths in a row by a member's own fault stop the run, however long it lived in between, ..."""
    proven_s: float = 3600.0
    """... unless it lived so long: then the row begins anew."""
    away_s: float = 900.0
    """So long a member may end again and again because something outside is away."""
    first_beat_s: float = 300.0
    """From the start of a process to its first beat: imports (torch takes minutes on a loaded machine), the log."""
    hang_s: float = 30.0
    """A process that has not beaten for so long hangs. Longer than a session: its partitions have moved before."""
    settled_s: float = 20.0
    """A process that lived so long was well: the next pause is the shortest again."""


@dataclass(frozen=True, slots=True)
class End:
    """How one life of a member ended."""

    code: int
    hung: bool = False
    """Its event loop did not turn for too long, so we killed it."""
    stopped: bool = False
    """It could not turn: somebody had stopped the process."""

    @property
    def own_fault(self) -> bool:
        return not self.stopped if self.hung else self.code not in FROM_OUTSIDE

    @property
    def how(self) -> str:
        if self.hung:
            return "hang"
        return f"signal {signal.Signals(-self.code).name}" if self.code < 0 else f"exit code {self.code}"


@dataclass(slots=True)
class Member:
    """One service process and its history."""

    name: str
    run_dir: Path
    patience: Patience = field(default_factory=Patience)
    process: Process | None = None
    deaths: deque[float] = field(default_factory=deque)
    """When it died by itself, within the time that counts."""
    short_lives: int = 0
    """In a row, until now."""
    away_since: float | None = None
    """When the first of these ended because something was away."""
    failures: int = 0
    """Deaths by its own fault, in a row, until now."""
    stopping: bool = False
    finished: bool = False
    """The sampler: its schedule is done."""

    @property
    def service(self) -> str:
        return self.name.partition("-")[0]

    @property
    def log_file(self) -> Path:
        return self.run_dir / "logs" / f"{self.name}.log"

    async def start(self) -> tuple[Process, int]:
        """A new process, and the pipe that its event loop beats into."""
        command = [sys.executable, "-m", "kat_stream.cli", "serve", self.service]
        command += ["--run", str(self.run_dir), "--member", self.name]
        self.log_file.parent.mkdir(exist_ok=True)
        heard, beaten = os.pipe()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment |= {SUPERVISOR: str(os.getpid()), HEART: str(beaten)}
        try:
            with self.log_file.open("ab") as out:
                self.process = await anyio.open_process(
                    command,
                    stdin=None,
                    stdout=out,
                    stderr=out,
                    env=environment,
                    start_new_session=True,
                    pass_fds=(beaten,),
                )
        except BaseException:  # also when cancelled: the pipe does not stay open, and it is raised again
            os.close(heard)
            raise
        finally:
            os.close(beaten)
        return self.process, heard

    def note_death(self, end: End, lived_s: float) -> str | None:
        """Count one end; the reason to give the member up, if there is one now."""
        if lived_s > self.patience.settled_s:
            self.short_lives, self.away_since = 0, None
        if lived_s > self.patience.proven_s or not end.own_fault:
            self.failures = 0
        self.short_lives += 1
        self.failures += end.own_fault
        if end.code == AWAY:
            return self._away_for_too_long()
        return self._died_too_often(end)

    def _away_for_too_long(self) -> str | None:
        now = time.monotonic()
        self.away_since = self.away_since or now
        away_s = now - self.away_since
        return f"{self.name}: what it needs was away for {away_s:.0f} s" if away_s > self.patience.away_s else None

    def _died_too_often(self, end: End) -> str | None:
        now = time.monotonic()
        self.deaths.append(now)
        while now - self.deaths[0] > self.patience.within_s:
            self.deaths.popleft()
        if len(self.deaths) >= self.patience.deaths:
            return f"{self.name} died {len(self.deaths)} times within {self.patience.within_s:g} s, last {end.how}"
        if self.failures >= self.patience.failures:
            return f"{self.name} died {self.failures} times in a row, last {end.how}"
        return None

    def pause_s(self) -> float:
        """Before the next start."""
        return self.patience.backoff_s[min(self.short_lives, len(self.patience.backoff_s)) - 1]

    def last_words(self) -> str:
        lines = self.log_file.read_text(errors="replace").splitlines() if self.log_file.exists() else []
        return "\n".join(f"    {line}" for line in lines[-LOG_TAIL:])


def members_of(config: Config) -> tuple[str, ...]:
    """The members of a run: all, further gateways, and a scorer where the configuration asks for one."""
    gateways = [f"gateway-{number}" for number, _ in enumerate(config.gateway.more, 2)]
    return (*PROCESSES, *gateways, *((SCORER,) if config.scorer.enabled else ()))


async def supervise(
    run_dir: Path, stopping: anyio.Event, members: Sequence[str] = PROCESSES, patience: Patience | None = None
) -> None:
    """Run all members until the sampler is finished or `stopping` is set; raises ServiceDied if one cannot live."""
    all_members = [Member(name, run_dir, patience or Patience()) for name in members]
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
        began = time.monotonic()
        end = await _live(member)
        if member.stopping or stopping.is_set():
            return
        if end.code == DONE and member.service == "sampler":
            log.info("the schedule is done")
            member.finished = True
            stopping.set()
            return
        telemetry.DEATHS.labels(member.name, end.how).inc()
        log.error("%s died (%s); its log: %s", member.name, end.how, member.log_file)
        reason = member.note_death(end, time.monotonic() - began)
        if reason is not None:
            failures.append(ServiceDied(f"{reason}:\n{member.last_words()}"))
            stopping.set()
            return
        await anyio.sleep(member.pause_s())
        log.warning("%s starts again", member.name)


async def _live(member: Member) -> End:
    """One process from start to end."""
    process, heard = await member.start()
    hung = stopped = False
    try:
        async with anyio.create_task_group() as group:

            async def listen() -> None:
                nonlocal hung, stopped
                hung = await _falls_silent(heard, member.patience)
                if hung:
                    stopped = _is_stopped(process.pid)
                    why = "somebody has stopped it" if stopped else "its event loop has not turned for too long"
                    log.error("%s hangs: %s; it is killed", member.name, why)
                    _signal(member, signal.SIGKILL)

            group.start_soon(listen)
            code = await process.wait()
            group.cancel_scope.cancel()
    finally:
        os.close(heard)
    return End(code, hung, stopped)


async def _falls_silent(heard: int, patience: Patience) -> bool:
    """Listen to beats: True when the next one did not come in time, False when the process has closed its end."""
    within_s = patience.first_beat_s
    while True:
        with anyio.move_on_after(within_s) as silence:
            await anyio.wait_readable(heard)
        if silence.cancelled_caught:
            return True
        if not os.read(heard, 4096):
            return False
        within_s = patience.hang_s


def _is_stopped(pid: int) -> bool:
    """Whether this child was stopped by a signal; False, too, if it has ended meanwhile."""
    with suppress(ChildProcessError):
        return os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None
    return False


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
