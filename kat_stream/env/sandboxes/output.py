"""Reading what a command writes: bounded in memory, never blocking the loop, never blocking the command for ever.

Owns the host's end of one output pipe. Invariant: at most `limit` bytes are kept, and whatever comes after them, or
after the end of the command, is still read and thrown away, at a bounded rate, as long as anybody holds the other
end.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

_CHUNK = 1 << 16  # bytes; also the capacity of a pipe, so the most that can be left in it after the end
_SURPLUS_PAUSE_S = 0.002  # 32 MB/s of surplus output costs the host a few percent of a core
_LINGER_PAUSE_S = 0.02  # a daemon's log after its command ended: 3 MB/s


class OutputPipe:
    """Collects from `fd` (owned from now on, must be non-blocking) until `finish`."""

    def __init__(self, fd: int, limit: int, when_full: Callable[[], object] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._fd = fd
        self._limit = limit
        self._when_full = when_full
        self._kept = bytearray()
        self._pause_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self.truncated = False
        self._loop.add_reader(fd, self._readable)

    @property
    def open(self) -> bool:
        return self._fd >= 0

    def finish(self) -> bytes:
        """What was written before now; later output is drained and dropped until `close` or the last writer is gone."""
        left = _CHUNK
        while self.open and left > 0 and (size := self._read_once()) > 0:
            left -= size
        kept, self._kept, self._limit = bytes(self._kept), bytearray(), 0
        self._when_full = None
        self._pause_s = _LINGER_PAUSE_S
        return kept

    def close(self) -> None:
        """Stop reading; a writer that is left gets EPIPE."""
        if self._timer is not None:
            self._timer.cancel()
        if self.open:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _readable(self) -> None:
        self._read_once()
        if self.open and self._pause_s:
            self._loop.remove_reader(self._fd)
            self._timer = self._loop.call_later(self._pause_s, self._resume)

    def _resume(self) -> None:
        self._loop.add_reader(self._fd, self._readable)

    def _read_once(self) -> int:
        """Bytes taken from the pipe; 0 when there is nothing now or the last writer is gone."""
        try:
            data = os.read(self._fd, _CHUNK)
        except BlockingIOError:
            return 0
        if not data:
            self.close()
            return 0
        room = self._limit - len(self._kept)
        self._kept += data[:room] if room > 0 else b""
        if len(data) > room:
            self._overflow()
        return len(data)

    def _overflow(self) -> None:
        self.truncated = True
        self._pause_s = self._pause_s or _SURPLUS_PAUSE_S
        if self._when_full is not None:
            self._when_full()
            self._when_full = None
