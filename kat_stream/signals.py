"""What a service process and its supervisor tell each other: stop, I am gone, I am done, I live.

SIGINT, SIGTERM or the death of the supervisor ask a service to stop gracefully. The service's event loop beats once a
second into a pipe that it inherited: no disk that may be full and no clock that may jump is part of it.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress

import anyio

SUPERVISOR = "KAT_STREAM_SUPERVISOR"
"""Environment variable with the pid of the supervisor; unset in a process that a person started."""
WATCH_S = 1.0
HEART = "KAT_STREAM_HEART"
"""Environment variable with the number of the pipe to beat into; unset in a process that a person started."""
BEAT_S = 1.0
AWAY = 75
"""Exit code of a service that ended because the log was away (EX_TEMPFAIL): not its fault, try again later."""
DONE = 80
"""Exit code of a supervised service whose work is done; 0 says only that it was asked to stop. None of sysexits.h."""


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


async def beat() -> None:
    """Tell the supervisor, until cancelled, that this event loop turns."""
    heart = os.environ.get(HEART)
    if heart is None:
        return
    os.set_blocking(int(heart), False)
    while True:
        # Full: the supervisor is stopped itself. Broken: it is gone, which `stop_with_supervisor` notices.
        with suppress(BlockingIOError, BrokenPipeError):
            os.write(int(heart), b".")
        await anyio.sleep(BEAT_S)
