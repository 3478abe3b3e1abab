"""The end of a sandbox, the same for every back end.

Owns destroy. Invariant: there is one end; once it has begun it goes on, whatever becomes of its callers.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from typing import Self


class Ending(ABC):
    """destroy and `async with` of the Sandbox protocol, on top of `_end`."""

    _ending: asyncio.Task[None] | None = None

    @abstractmethod
    async def _end(self) -> None:
        """End everything inside and remove what there is of it; DeadlineExceeded if something lives on."""

    async def destroy(self) -> None:
        if self._ending is None:
            self._ending = asyncio.create_task(self._end())
        # A caller that is cancelled must not leave half a sandbox behind.
        await asyncio.shield(self._ending)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.destroy()
