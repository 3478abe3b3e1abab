"""What asks a process to stop gracefully: SIGINT, SIGTERM, or the death of the supervisor that started it."""

from __future__ import annotations

import os
import signal

import anyio

SUPERVISOR = "KAT_STREAM_SUPERVISOR"
"""Environment variable with the pid of the supervisor; unset in a process that a person started."""
WATCH_S = 1.0


async def stop_on_signal(stopping: anyio.Event, signalled: anyio.Event | None = None) -> None:
    """Set `stopping` (and `signalled`) at the first signal, and again ask politely at each further one."""
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            if signalled is not None:
                signalled.set()
            stopping.set()


async def stop_with_supervisor(stopping: anyio.Event) -> None:
    """Set `stopping` when the supervisor is gone: killed with -9, it cannot say so, and nobody would stop us."""
    supervisor = os.environ.get(SUPERVISOR)
    while supervisor is not None and not stopping.is_set():
        if os.getppid() != int(supervisor):
            stopping.set()
        await anyio.sleep(WATCH_S)
