"""What a service is, and how one is found by name.

A service is one `async def run(ctx)` that works until `ctx.stopping` is set or its work is done, and raises when it
cannot go on. The same object runs as a task of one process (in-memory log) or as an OS process of its own (Kafka).
Invariant: services meet only on the log and at the addresses in the resolved configuration, never in memory.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Protocol

import anyio

from kat_stream.config import Config
from kat_stream.errors import ConfigError, DeadlineExceeded
from kat_stream.log.base import Log
from kat_stream.log.dead_letter_cap import DeadLetterLimit

SERVICE_GROUP = "kat_stream.services"
POLL_S = 0.1


@dataclass(slots=True)
class Context:
    """What a service is given: its configuration, the log, its own name, and the signal to stop."""

    config: Config
    run: str
    run_dir: Path
    log: Log
    member: str
    log_id: str = "kafka"
    """What offsets belong to: one name for a broker, a new one for each in-memory log."""
    stopping: anyio.Event = field(default_factory=anyio.Event)

    @property
    def engine_urls(self) -> tuple[str, ...]:
        """Engines to use: the configured ones, or the embedded one at its resolved port."""
        engine = self.config.engine
        return engine.urls or (f"http://{engine.host}:{engine.port}",)

    @property
    def gateway_url(self) -> str:
        return self.gateway_urls[0]

    @property
    def gateway_control_url(self) -> str:
        return self.gateway_control_urls[0]

    @property
    def gateway_urls(self) -> tuple[str, ...]:
        """For agents, of every gateway of the run."""
        section = self.config.gateway
        return tuple(f"http://{section.host}:{port}" for port in (section.port, *(port for port, _ in section.more)))

    @property
    def gateway_control_urls(self) -> tuple[str, ...]:
        """For workers, in the same order."""
        section = self.config.gateway
        ports = (section.control_port, *(port for _, port in section.more))
        return tuple(f"http://{section.host}:{port}" for port in ports)

    @property
    def number(self) -> int:
        """Which of the processes of its service this is, from 0: `rollout-2` is 1."""
        digits = self.member.partition("-")[2]
        return int(digits) - 1 if digits.isdecimal() and int(digits) else 0

    def group(self, stage: str) -> str:
        """The consumer group of a stage: runs on one broker do not take each other's messages."""
        return f"{self.run}.{stage}"

    @property
    def dead_letters(self) -> DeadLetterLimit:
        """How many dead letters a stage may write before it stops."""
        log = self.config.log
        return DeadLetterLimit(log.dead_letters_most, log.dead_letters_share, log.dead_letters_window_s)

    async def unless_stopped(self, awaited: Awaitable[object]) -> bool:
        """Await it, but no longer than until the service is asked to stop; whether it came to its end."""
        done = False
        async with anyio.create_task_group() as group:
            group.start_soon(_cancel_when, self.stopping, group.cancel_scope)
            await awaited
            done = True
            group.cancel_scope.cancel()
        return done

    async def stopped_within(self, seconds: float) -> bool:
        """Sleep, but wake when the service is asked to stop; True if it was."""
        with anyio.move_on_after(seconds):
            await self.stopping.wait()
        return self.stopping.is_set()


class Service(Protocol):
    async def run(self, ctx: Context) -> None: ...


def load_service(name: str) -> Service:
    """The service registered under this name in the entry-point group `kat_stream.services`."""
    found = {entry.name: entry for entry in entry_points(group=SERVICE_GROUP)}
    if name not in found:
        raise ConfigError(f"no service `{name}`; there are: {', '.join(sorted(found))}")
    service: Service = found[name].load()()
    return service


async def _cancel_when(event: anyio.Event, scope: anyio.CancelScope) -> None:
    await event.wait()
    scope.cancel()


async def wait_until(what: str, ready: Callable[[], Awaitable[bool]], *, deadline_s: float) -> None:
    """Poll until `ready` says so; DeadlineExceeded names what was awaited."""
    give_up = time.monotonic() + deadline_s
    while not await ready():
        if time.monotonic() > give_up:
            raise DeadlineExceeded(what, deadline_s)
        await anyio.sleep(POLL_S)
