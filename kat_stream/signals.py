"""SIGINT and SIGTERM as a request to stop gracefully."""

from __future__ import annotations

import signal

import anyio


async def stop_on_signal(stopping: anyio.Event, signalled: anyio.Event | None = None) -> None:
    """Set `stopping` (and `signalled`) at the first signal, and again ask politely at each further one."""
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            if signalled is not None:
                signalled.set()
            stopping.set()
