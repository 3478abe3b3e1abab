"""Live progress of a run: follows its log, redraws a panel in a terminal, prints plain lines elsewhere.

Invariant: it only watches. A log that is away for a while costs the view some seconds, never the run.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping
from types import TracebackType
from typing import Self

import anyio
from rich.console import Console
from rich.live import Live

from kat_stream.errors import LogError
from kat_stream.log import Follower, Log
from kat_stream.log.lag import lags
from kat_stream.observe.sources import ALL_TOPICS, Unreadable
from kat_stream.observe.state import RunState
from kat_stream.observe.view import Lines, panel
from kat_stream.service import Context

log = logging.getLogger(__name__)

REDRAW_S = 0.5
LAG_EVERY_S = 2.0
RETRY_S = 2.0
POLL_S = 0.25
WATCHED = tuple(name for name in ALL_TOPICS if name not in ("tasks", "scores", "dead.letters"))


class Progress:
    """`with Progress(steps=40) as progress:` and run `progress.follow(ctx)` as a task beside the services."""

    def __init__(self, *, steps: int, console: Console | None = None) -> None:
        self.state = RunState()
        self.console = console or Console(highlight=False)
        self._steps = steps
        self._lines = Lines(steps)
        self._lag: Mapping[str, int] = {}
        self._drawn_s = self._asked_lag_s = 0.0
        self._unreadable = Unreadable()
        self._position: dict[tuple[str, int], int] = {}
        self._wanted = anyio.Event()
        self._caught_up = anyio.Event()
        self._live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._show(force=True)
        if self._live is not None:
            self._live.stop()

    async def follow(self, ctx: Context) -> None:
        """Watch until cancelled."""
        while True:
            try:
                await self._watch(ctx)
            except LogError as error:
                log.warning("progress: %s", error)
                await anyio.sleep(RETRY_S)

    async def catch_up(self) -> None:
        """Wait until all that is on the log now was shown; the caller sets the deadline."""
        self._caught_up = anyio.Event()
        self._wanted.set()
        await self._caught_up.wait()

    async def _watch(self, ctx: Context) -> None:
        async with ctx.log.follow(WATCHED, start=self._position or "earliest") as follower:
            while True:
                await self._take(ctx, follower)
                if self._wanted.is_set() and await follower.caught_up():
                    self._wanted = anyio.Event()
                    self._caught_up.set()
                await self._ask_lag(ctx.log)
                self._show()

    async def _take(self, ctx: Context, follower: Follower) -> None:
        for delivered in await follower.poll(POLL_S):
            record = self._unreadable.read(delivered)
            if record is not None and record.run == ctx.run:
                self.state.apply(record, delivered.timestamp_ms)
        self._position = {(topic, partition): offset for (topic, partition), offset in follower.position().items()}

    async def _ask_lag(self, the_log: Log) -> None:
        if self._live is not None and time.monotonic() - self._asked_lag_s > LAG_EVERY_S:
            self._asked_lag_s = time.monotonic()
            totals: Counter[str] = Counter()
            for lag in await lags(the_log):
                totals[lag.topic] += lag.messages
            self._lag = totals

    def _show(self, *, force: bool = False) -> None:
        if not force and time.monotonic() - self._drawn_s < REDRAW_S:
            return
        self._drawn_s = time.monotonic()
        now_ms = int(time.time() * 1000)
        if self._live is not None:
            self._live.update(panel(self.state, self._steps, self._lag, now_ms), refresh=True)
            return
        for line in self._lines.new(self.state, now_ms):
            self.console.print(line, markup=False, soft_wrap=True)
