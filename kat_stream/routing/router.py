"""The router: a fleet of engines, their load and health, and the lease of one of them for one call.

Invariant: what a call may cost is credited to its engine when it is leased and taken back when the lease ends, however
it ends. An engine that refuses is skipped until its back-off is over or a poll finds it well; one that says nothing,
until it answers. No call waits for an engine that is gone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Self

import aiohttp
import anyio
from prometheus_client import Counter, Gauge

from kat_stream.engines.client import EngineClient
from kat_stream.errors import DeadlineExceeded, EngineError, EngineUnavailable
from kat_stream.routing.engine_state import SILENT_POLLS, EngineState
from kat_stream.routing.policy import RoutingPolicy
from kat_stream.routing.sticky import StickyLeastLoaded

DISPATCHED = Counter("kat_router_dispatched_total", "Calls sent to an engine", ["engine"])
FAILED = Counter("kat_router_engine_failures_total", "Calls and polls that an engine refused or broke off", ["engine"])
LOAD = Gauge("kat_router_engine_load_tokens", "Tokens that the router believes are on an engine", ["engine"])

POLL_S = 1.0
POLL_DEADLINE_S = 5.0
RECHECK_S = 0.05
"""How often a call that found no engine looks again."""


class Router:
    """Used as `async with Router(urls) as router`; owns the HTTP connections to its engines."""

    def __init__(
        self,
        urls: Iterable[str],
        *,
        policy: RoutingPolicy | None = None,
        poll_s: float = POLL_S,
        record_routing: bool = False,
    ) -> None:
        self._urls, self._policy, self._poll_s = tuple(urls), policy or StickyLeastLoaded(), poll_s
        self._record_routing = record_routing
        self._engines: dict[str, EngineState] = {}
        self._session: aiohttp.ClientSession | None = None
        self._polling = anyio.create_task_group()
        """An error in the poller is raised where the router is used: a dead poller would hide every engine."""

    async def __aenter__(self) -> Self:
        # No limit on connections: how many calls run at once is admission's business, not a pool's.
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        for url in self._urls:
            self.add(url)
        await self._polling.__aenter__()
        self._polling.start_soon(self._poll_for_ever)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._polling.cancel_scope.cancel()
        try:
            await self._polling.__aexit__(kind, error, trace)
        except BaseExceptionGroup as errors:
            if errors.exceptions != (error,):  # the user's own error goes on as it is
                raise
        finally:
            if self._session is not None:
                await self._session.close()

    def add(self, url: str) -> None:
        """Take an engine into the fleet; one that is there already stays as it is."""
        if self._session is None:
            raise EngineUnavailable("the router is not open")
        url = url.rstrip("/")
        client = EngineClient(url, self._session, record_routing=self._record_routing)
        self._engines.setdefault(url, EngineState(client))

    def remove(self, url: str) -> None:
        """Send nothing more to this engine; what it runs goes on."""
        self._engines.pop(url.rstrip("/"), None)

    def list(self) -> tuple[EngineState, ...]:
        """The fleet."""
        return tuple(self._engines.values())

    def forget(self, session: str) -> None:
        """The session ended."""
        self._policy.forget(session)

    @asynccontextmanager
    async def lease(self, session: str, tokens: int, *, deadline_s: float) -> AsyncIterator[EngineState]:
        """An engine for one call that holds up to `tokens` tokens. EngineUnavailable if none answers in time.

        An EngineUnavailable raised inside counts against the engine, and so does a DeadlineExceeded, if the engine
        answered nobody meanwhile: a long call may take all its time on an engine that is well. What is underway on an
        engine that is found to be gone is cancelled, and becomes an EngineUnavailable.
        """
        state = await self._choose(session, tokens, deadline_s)
        DISPATCHED.labels(state.url).inc()
        state.in_flight += tokens
        answers = state.answers
        scope = asyncio.timeout(None)
        try:
            async with scope:
                state.underway.add(scope)
                yield state
            state.answered()
        except TimeoutError as error:  # of `scope`: a call's own deadline is a DeadlineExceeded
            raise EngineUnavailable(f"{state.url} is gone: it answers nobody") from error
        except EngineUnavailable:
            self._blame(state)
            raise
        except DeadlineExceeded:
            if state.answers == answers:
                self._blame(state)
            raise
        finally:
            state.underway.discard(scope)
            state.in_flight -= tokens

    async def _choose(self, session: str, tokens: int, deadline_s: float) -> EngineState:
        give_up = time.monotonic() + deadline_s
        while True:
            now = time.monotonic()
            if candidates := [state for state in self._engines.values() if state.available(now)]:
                return self._policy.choose(session, tokens, candidates)
            if now > give_up:
                raise EngineUnavailable(f"none of {len(self._engines)} engines answered within {deadline_s:g} s")
            await asyncio.sleep(RECHECK_S)

    @staticmethod
    def _blame(state: EngineState) -> None:
        FAILED.labels(state.url).inc()
        state.failed(time.monotonic())

    async def _poll_for_ever(self) -> None:
        while True:
            await asyncio.gather(*(self._poll(state) for state in self.list()))
            await asyncio.sleep(self._poll_s)

    async def _poll(self, state: EngineState) -> None:
        try:
            async with asyncio.timeout(POLL_DEADLINE_S):
                state.polled(await state.engine.loads())
        except EngineUnavailable:
            state.lost_polls += 1
            self._blame(state)
        except EngineError:
            # It has no such endpoint: that says nothing about its health, but that it lives.
            state.heard()
        except (DeadlineExceeded, TimeoutError):
            # It may be busy with something long, unless that goes on.
            state.lost_polls += 1
            state.silent_polls += 1
            if state.silent_polls >= SILENT_POLLS:
                FAILED.labels(state.url).inc()
        else:
            if not state.available(time.monotonic()):
                state.answered()
        finally:
            LOAD.labels(state.url).set(state.load)
        if state.lost_polls >= SILENT_POLLS and state.underway:
            await self._leave_if_gone(state)

    @staticmethod
    async def _leave_if_gone(state: EngineState) -> None:
        """While an engine loads weights it cannot tell its load, but its server still says what it serves."""
        try:
            async with asyncio.timeout(POLL_DEADLINE_S):
                await state.engine.info()
        except (EngineUnavailable, DeadlineExceeded, TimeoutError):
            state.leave()
        except EngineError:
            pass  # no such endpoint, says somebody
