"""Reading what a command writes: bounded in memory, never blocking the loop, never blocking the command for ever.

Owns the host's end of one output pipe. Invariant: of more than `limit` bytes the first and the last half are kept (and
for a time _SLACK more), for an error stands at the end as a rule; whatever comes beyond `limit`, or after the end of
the command, is still read, at a bounded rate, as long as anybody holds the other end.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

_CHUNK = 1 << 16  # bytes; also the capacity of a pipe, so the most that can be left in it after the end
_SLACK = 1 << 20  # bytes more than the limit before the middle is dropped: each time, what is behind it moves
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
        self._left_out = 0
        self._finished = False
        self._pause_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self.truncated = False
        self._loop.add_reader(fd, self._readable)

    @property
    def open(self) -> bool:
        return self._fd >= 0

    def finish(self) -> bytes:
        """What was written before now, with a line in the place of what was left out.

        Later output is drained and dropped until `close` or the last writer is gone.
        """
        left = _CHUNK
        while self.open and left > 0 and (size := self._read_once()) > 0:
            left -= size
        self._drop_middle()
        kept, self._kept, self._finished = self._kept, bytearray(), True
        self._when_full = None
        self._pause_s = _LINGER_PAUSE_S
        if self._left_out:
            middle = self._limit // 2
            kept[middle:middle] = b"\n[%d bytes left out]\n" % self._left_out
        return bytes(kept)

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
        if not self._finished:
            self._keep(data)
        return len(data)

    def _keep(self, data: bytes) -> None:
        self._kept += data
        if len(self._kept) > self._limit:
            self._overflow()
        if len(self._kept) > self._limit + _SLACK:
            self._drop_middle()

    def _drop_middle(self) -> None:
        surplus = max(len(self._kept) - self._limit, 0)
        middle = self._limit // 2
        del self._kept[middle : middle + surplus]
        self._left_out += surplus

    def _overflow(self) -> None:
        self.truncated = True
        self._pause_s = self._pause_s or _SURPLUS_PAUSE_S
        if self._when_full is not None:
            self._when_full()
            self._when_full = None
