"""Carries bytes between a listener inside a sandbox and the gateway's data port.

Owns the host side of the only way out of a sandbox. Invariant: every connection goes to the one address given, the
number of connections is bounded, and none outlives the relay.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

from kat_stream.errors import ConfigError

MAX_CONNECTIONS = 32
_CHUNK = 1 << 16
_CONNECT_TIMEOUT_S = 10.0


@contextlib.asynccontextmanager
async def relay(listener: socket.socket, target_url: str) -> AsyncIterator[None]:
    """Serve `listener` while the context is open; `target_url` is http://host:port. Closes the listener at the end."""
    host, port = _address(target_url)
    carried: set[asyncio.Task[None]] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None or len(carried) >= MAX_CONNECTIONS:
            writer.close()
            return
        carried.add(task)
        try:
            await _carry(reader, writer, host, port)
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


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname or not parts.port:
        raise ConfigError(f"gateway data URL {url!r}: expected http://host:port")
    return parts.hostname, parts.port


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str, port: int) -> None:
    """One connection, both directions, until both sides are done or one breaks."""
    try:
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            up_reader, up_writer = await asyncio.open_connection(host, port)
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
