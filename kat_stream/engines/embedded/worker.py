"""The model's thread: runs the scheduler's steps and talks to the event loop.

Owns the thread. Invariant: scheduler, model and keys and values are touched by this thread only; the event loop hands
it functions to call between two steps, and gets every answer back through `call_soon_threadsafe`, one call a step.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import torch

from kat_stream.engines.embedded.request import Request
from kat_stream.engines.embedded.runner import ModelRunner
from kat_stream.engines.embedded.scheduler import Scheduler
from kat_stream.errors import DeadlineExceeded, EngineUnavailable

# An idle engine looks around this often; whatever it waits for wakes it at once.
IDLE_SECONDS = 1.0


class Worker:
    """Runs one model. Each request of `submit` reports through its queue: (output tokens so far, finished)."""

    def __init__(self, runner: ModelRunner, max_running: int, threads: int | None) -> None:
        self.scheduler = Scheduler(runner, max_running, self._progress, np.random.default_rng())
        self.failure: BaseException | None = None
        self._threads = threads
        self._loop = asyncio.get_running_loop()
        self._queues: dict[Request, asyncio.Queue[tuple[int, bool]]] = {}
        self._calls: deque[tuple[Callable[[], Any], asyncio.Future[Any]]] = deque()
        self._events: list[tuple[Request, int, bool]] = []
        self._wake = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._main, name="kat-engine", daemon=True)
        self._thread.start()

    # -- in the event loop ------------------------------------------------------------------------------------------

    async def submit(self, request: Request) -> asyncio.Queue[tuple[int, bool]]:
        """Queue a request; its progress comes through the returned queue, (-1, True) when the engine goes away."""
        self._require_alive()
        queue: asyncio.Queue[tuple[int, bool]] = asyncio.Queue()
        self._queues[request] = queue
        self.post(lambda: self.scheduler.submit(request))
        return queue

    def drop(self, request: Request) -> None:
        """The client is gone: forget the request and end it."""
        if self._queues.pop(request, None) is not None:
            self.post(lambda: self.scheduler.abort(lambda other: other is request))

    async def call(self, function: Callable[[], Any], seconds: float) -> Any:
        """What `function` returns in the model's thread between two steps. Raises DeadlineExceeded,
        EngineUnavailable."""
        self._require_alive()
        return await within(seconds, self.post(function), "engine, between two steps")

    async def close(self, seconds: float = 10.0) -> None:
        """End the thread after its current step; all pending requests and calls end with an error."""
        self._closing = True
        self._wake.set()
        await asyncio.to_thread(self._thread.join, seconds)
        self._fail_all()

    def post(self, function: Callable[[], Any]) -> asyncio.Future[Any]:
        """Have `function` called in the model's thread between two steps; the future tells its result."""
        future: asyncio.Future[Any] = self._loop.create_future()
        self._calls.append((function, future))
        self._wake.set()
        return future

    def _require_alive(self) -> None:
        if self._closing or self.failure is not None:
            raise EngineUnavailable(f"the engine is closed: {self.failure or 'shut down'}")

    def _deliver(self, events: list[tuple[Request, int, bool]]) -> None:
        for request, count, finished in events:
            queue = self._queues.pop(request, None) if finished else self._queues.get(request)
            if queue is not None:
                queue.put_nowait((count, finished))

    def _fail_all(self) -> None:
        for queue in self._queues.values():
            queue.put_nowait((-1, True))
        self._queues.clear()
        error = EngineUnavailable(f"the engine is closed: {self.failure or 'shut down'}")
        while self._calls:
            _, future = self._calls.popleft()
            if not future.done():
                future.set_exception(error)
                future.exception()  # nobody may be waiting for a posted call; do not warn of it

    # -- in the model's thread --------------------------------------------------------------------------------------

    def _progress(self, request: Request, finished: bool) -> None:
        self._events.append((request, len(request.output), finished))

    def _main(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        try:
            with torch.inference_mode():
                while not self._closing:
                    self._turn()
        except Exception as error:  # a broken model or memory: nothing can be served, so everybody is told
            self.failure = error
            self._notify(self._fail_all)

    def _turn(self) -> None:
        self._wake.clear()
        while self._calls:
            self._answer(*self._calls.popleft())
        worked = self.scheduler.step()
        if self._events:
            events, self._events = self._events, []
            self._notify(self._deliver, events)
        if not worked:
            begin = time.perf_counter()
            self._wake.wait(IDLE_SECONDS)
            self.scheduler.stats.idle_seconds += time.perf_counter() - begin

    def _answer(self, function: Callable[[], Any], future: asyncio.Future[Any]) -> None:
        try:
            result = function()
        except Exception as error:  # the caller's error, told to the caller; the model's thread goes on
            self._notify(_settle, future, None, error)
        else:
            self._notify(_settle, future, result, None)

    def _notify(self, function: Callable[..., None], *arguments: Any) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)


async def within[T](seconds: float, awaited: Awaitable[T], what: str) -> T:
    """What `awaited` gives, if it does so in time; DeadlineExceeded says what was awaited."""
    try:
        return await asyncio.wait_for(awaited, seconds)
    except TimeoutError as error:
        raise DeadlineExceeded(what, seconds) from error


def _settle(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
