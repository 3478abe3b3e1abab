"""Work that a cancellation must not cut in half.

asyncio cancels a task once for each reason; a scope of anyio cancels whatever is awaited, also in a `finally`, again
and again until the scope is left. A poll or a commit that is cut in half leaves aiokafka or the transaction undefined
(research/kafka_real.md 2.4, 3.10), a command that is cut in half its sandbox frozen. Invariant: `whole` returns or
raises only after its work has ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import anyio


async def whole[T](work: Coroutine[Any, Any, T]) -> T:
    """Run `work`, which must bound itself, to its end however often the caller is cancelled, then pass that on."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        with anyio.CancelScope(shield=True):
            while not task.done():
                try:
                    await asyncio.wait([task])
                except asyncio.CancelledError:
                    continue  # it is raised below, once
        if not task.cancelled():
            task.exception()  # seen: the cancellation is what the caller has to know
        raise
