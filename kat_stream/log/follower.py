"""What every follower does alike: the tail, and reading up to now. An implementation gives `open`, `poll`, `_ends`.

Invariant: a follower hands out each message of its partitions once, in order, from where it started.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator
from typing import Self

from kat_stream.errors import DeadlineExceeded
from kat_stream.log.base import Delivered, TopicPartition


class BaseFollower(ABC):
    """The shared part of the `Follower` protocol."""

    def __init__(self, poll_s: float) -> None:
        self._poll_s = poll_s
        self._ready: deque[Delivered] = deque()
        """Polled, not handed out by `async for` yet."""

    @abstractmethod
    async def open(self) -> None: ...

    @abstractmethod
    async def _fetch(self, timeout_s: float) -> list[Delivered]:
        """What is there, or what comes within `timeout_s`."""

    @abstractmethod
    async def _ends(self) -> dict[TopicPartition, int]: ...

    @abstractmethod
    async def _reached(self, ends: dict[TopicPartition, int]) -> bool:
        """Whether everything below `ends` was fetched."""

    @abstractmethod
    def _fetched(self) -> dict[TopicPartition, int]: ...

    @abstractmethod
    async def aclose(self) -> None: ...

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delivered:
        while not self._ready:
            self._ready.extend(await self._fetch(self._poll_s))
        return self._ready.popleft()

    async def poll(self, timeout_s: float) -> list[Delivered]:
        if not self._ready:
            return await self._fetch(timeout_s)
        ready = list(self._ready)
        self._ready.clear()
        return ready

    def position(self) -> dict[TopicPartition, int]:
        positions = self._fetched()
        for delivered in reversed(self._ready):
            positions[delivered.position.topic_partition] = delivered.position.offset
        return positions

    async def caught_up(self) -> bool:
        await self.open()
        return not self._ready and await self._reached(await self._ends())

    async def catch_up(self, deadline_s: float = 60.0) -> AsyncIterator[Delivered]:
        await self.open()
        give_up = time.monotonic() + deadline_s
        ends = await self._ends()
        while True:
            while self._ready:
                yield self._ready.popleft()
            if await self._reached(ends):
                return
            if time.monotonic() > give_up:
                raise DeadlineExceeded("reading a topic up to its end", deadline_s)
            self._ready.extend(await self._fetch(self._poll_s))
