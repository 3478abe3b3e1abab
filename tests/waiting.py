"""Waiting until something is so: the one place where the tests poll.

Invariant: a wait ends at its deadline with a TimeoutError that says for what it was. A pause is a tenth of the
wait so far, within bounds: no short wait is slow, and no long one a load.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from inspect import isawaitable

import anyio

WAIT_S = 60.0
FIRST_S, LAST_S = 0.001, 0.05


async def until[T](ready: Callable[[], T | Awaitable[T]], what: str = "it", deadline_s: float = WAIT_S) -> T:
    """What `ready` answers, once that counts as true."""
    began = time.monotonic()
    with anyio.move_on_after(deadline_s):
        while True:
            answer = ready()
            found: T = await answer if isawaitable(answer) else answer
            if found:
                return found
            await anyio.sleep(min(max(FIRST_S, (time.monotonic() - began) / 10), LAST_S))
    raise TimeoutError(f"{what}: not within {deadline_s:g} s")


def wait_for(ready: Callable[[], object], what: str, deadline_s: float = WAIT_S) -> float:
    """As `until`, where no loop runs; returns the seconds that it took."""
    began = time.monotonic()
    while not ready():
        if time.monotonic() - began > deadline_s:
            raise TimeoutError(f"{what}: not within {deadline_s:g} s")
        time.sleep(LAST_S)
    return time.monotonic() - began
