"""The back ends of the sandboxes' contract: the same tests over bubblewrap and local.

bubblewrap is skipped only where it is not installed: where it is and does not work, the tests say so.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from kat_stream.env.sandboxes import Sandbox, SandboxBackend, SandboxSpec
from kat_stream.env.sandboxes.bwrap import BwrapBackend
from kat_stream.env.sandboxes.local import LocalBackend

needs_bwrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
BACKENDS = [pytest.param("bwrap", marks=needs_bwrap), "local"]
Scenario = Callable[[Sandbox], Awaitable[None]]


@asynccontextmanager
async def backend(name: str) -> AsyncIterator[SandboxBackend]:
    made: SandboxBackend = BwrapBackend() if name == "bwrap" else LocalBackend(allow_unsafe=True)
    try:
        yield made
    finally:
        await made.close()


@pytest.fixture(params=BACKENDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def play(kind: str, scenario: Scenario, spec: SandboxSpec | None = None) -> None:
    async def main() -> None:
        async with backend(kind) as made, await made.create(spec or SandboxSpec()) as sandbox:
            await scenario(sandbox)

    asyncio.run(asyncio.wait_for(main(), 60))


def own(command: str) -> str:
    """A sleep of this process: `local` sees all of the machine, also those of this test run by another user."""
    return f"{command}.{os.getpid()}"
