"""The life of a sandbox, the same for every back end: one command at a time, and one end.

Owns destroy. Invariant: once the end has begun it goes on, whatever becomes of its callers.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Self

from kat_stream.errors import DeadlineExceeded


class Life(ABC):
    """destroy and `async with` of the Sandbox protocol on top of `_end`; commands wait for each other by `_alone`."""

    id: str

    def __init__(self) -> None:
        self._one = asyncio.Lock()
        self._ending: asyncio.Task[None] | None = None

    @abstractmethod
    def _check_alive(self) -> None:
        """Raises SandboxDied."""

    @abstractmethod
    async def _end(self) -> None:
        """End everything inside and remove what there is of it; DeadlineExceeded if something lives on."""

    @asynccontextmanager
    async def _alone(self, timeout_s: float) -> AsyncIterator[None]:
        """No other command runs meanwhile; DeadlineExceeded if one still does after `timeout_s`, SandboxDied."""
        try:
            await asyncio.wait_for(self._one.acquire(), timeout_s)
        except TimeoutError:
            raise DeadlineExceeded(f"sandbox {self.id} is busy with another command", timeout_s) from None
        try:
            self._check_alive()
            yield
        finally:
            self._one.release()

    async def destroy(self) -> None:
        if self._ending is None:
            self._ending = asyncio.create_task(self._end())
        # A caller that is cancelled must not leave half a sandbox behind.
        await asyncio.shield(self._ending)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.destroy()
