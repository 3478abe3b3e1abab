"""Carries bytes between a listener, such as one inside a sandbox, and the gateway's data port.

Owns the host side of the only way out of a sandbox. Invariant: every connection goes to one of the addresses given, the
number of connections is bounded, and none outlives the relay. Where nobody listens the next address is tried, until
one answers or the wait is over: a gateway that is started again is waited for, so that an agent's retry is no failure.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from urllib.parse import urlsplit

from kat_stream.errors import ConfigError

MAX_CONNECTIONS = 32
_CHUNK = 1 << 16
_CONNECT_TIMEOUT_S = 10.0
_AGAIN_S = 0.2
"""Between two rounds over addresses none of which answers."""
_PATIENCE_S = 60.0
"""For one of the addresses to answer: longer than a gateway takes to start."""


@contextlib.asynccontextmanager
async def relay(
    listener: socket.socket, *target_urls: str, most: int = MAX_CONNECTIONS, patience_s: float = _PATIENCE_S
) -> AsyncIterator[None]:
    """Serve `listener` while the context is open. Closes the listener at the end.

    `target_urls` are http://host:port: the first that answers is kept until it does not. `most`: connections at once.
    """
    targets = Targets([_address(url) for url in target_urls], patience_s)
    carried: set[asyncio.Task[None]] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None or len(carried) >= most:
            writer.close()
            return
        carried.add(task)
        try:
            await _carry(reader, writer, targets)
        except asyncio.CancelledError:
            # Only the relay's end cancels it; asyncio's own callback would report a cancelled task as a defect.
            writer.close()
        finally:
            carried.discard(task)

    server = await asyncio.start_server(accept, sock=listener)
    try:
        yield
    finally:
        server.close()
        for task in list(carried):
            task.cancel()
        await asyncio.gather(*carried, return_exceptions=True)


class Targets:
    """Where connections go."""

    def __init__(self, addresses: Sequence[tuple[str, int]], patience_s: float) -> None:
        self._addresses, self._patience_s = deque(addresses), patience_s

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """To the address that answered last, else to the next that does; OSError or TimeoutError if none does."""
        give_up = time.monotonic() + self._patience_s
        tried = 0
        while True:
            tried += 1
            host, port = address = self._addresses[0]
            try:
                async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                    return await asyncio.open_connection(host, port)
            except (OSError, TimeoutError):
                if self._addresses[0] == address:  # else another connection has turned to the next one already
                    self._addresses.rotate(-1)
                if time.monotonic() + _AGAIN_S > give_up:
                    raise
            if tried % len(self._addresses) == 0:
                await asyncio.sleep(_AGAIN_S)


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname or not parts.port:
        raise ConfigError(f"gateway data URL {url!r}: expected http://host:port")
    return parts.hostname, parts.port


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, targets: Targets) -> None:
    """One connection, both directions, until both sides are done or one breaks."""
    try:
        up_reader, up_writer = await targets.connect()
    except (OSError, TimeoutError):
        writer.close()
        return
    try:
        await asyncio.gather(_pump(reader, up_writer), _pump(up_reader, writer))
    except OSError:
        # One side broke off: closing both is all there is to say to the other.
        pass
    finally:
        writer.close()
        up_writer.close()


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    """Copy until end of stream, then pass the end on, so that a half-closed connection stays one."""
    while chunk := await source.read(_CHUNK):
        sink.write(chunk)
        await sink.drain()
    if sink.can_write_eof():
        sink.write_eof()
