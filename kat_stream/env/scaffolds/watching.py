"""A sandbox back end whose sandboxes are looked at before they go.

Owns nothing but that moment. Invariant: a sandbox is destroyed as often as its user says, and looked at once, before.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, cast

from kat_stream.env.sandboxes.base import Sandbox, SandboxBackend, SandboxSpec

AtEnd = Callable[[Sandbox], Awaitable[None]]


class Watching:
    """Makes sandboxes as `inner` does and remembers them; `at_end` looks at each before it is destroyed."""

    def __init__(self, inner: SandboxBackend, at_end: AtEnd) -> None:
        self.inner, self.name, self.isolated = inner, inner.name, inner.isolated
        self.made: list[Sandbox] = []
        self._at_end = at_end

    async def create(self, spec: SandboxSpec, *, owner: str = "") -> Sandbox:
        self.made.append(await self.inner.create(spec, owner=owner))
        return cast(Sandbox, _Watched(self.made[-1], self._at_end))

    @property
    def memory_bytes(self) -> int:
        """The most that a sandbox held, of those that were destroyed; 0 where the back end does not say."""
        return max((getattr(sandbox, "peak_memory_bytes", 0) for sandbox in self.made), default=0)


class _Watched:
    def __init__(self, inner: Sandbox, at_end: AtEnd) -> None:
        self._inner, self._at_end, self._seen = inner, at_end, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def __aenter__(self) -> Any:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.destroy()

    async def destroy(self) -> None:
        if not self._seen:
            self._seen = True
            await self._at_end(self._inner)
        await self._inner.destroy()
