"""The relay finds a gateway that answers: another one, or the same once it is back."""

from __future__ import annotations

import asyncio
import socket

import pytest

from kat_stream.env.scaffolds.relay import relay
from kat_stream.ports import choose_port

pytestmark = pytest.mark.anyio


async def _server(name: bytes, port: int = 0) -> asyncio.Server:
    """Says its name to whoever connects."""

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(name)
        writer.close()

    return await asyncio.start_server(serve, "127.0.0.1", port)


def _url(port: int) -> str:
    return f"http://127.0.0.1:{port}"


async def _heard(door: socket.socket) -> bytes:
    async with asyncio.timeout(20):
        reader, writer = await asyncio.open_connection(*door.getsockname())
        said = await reader.read()
        writer.close()
        return said


async def test_the_next_gateway_is_taken_and_kept_where_the_first_does_not_answer() -> None:
    door, dead = socket.create_server(("127.0.0.1", 0)), choose_port()
    second = await _server(b"second")
    async with second, relay(door, _url(dead), _url(second.sockets[0].getsockname()[1])):
        assert await _heard(door) == b"second"
        async with await _server(b"first", dead):
            assert await _heard(door) == b"second"


async def test_a_gateway_that_comes_back_is_waited_for() -> None:
    door, port = socket.create_server(("127.0.0.1", 0)), choose_port()
    async with relay(door, _url(port), patience_s=20.0):
        waiting = asyncio.create_task(_heard(door))
        done, _ = await asyncio.wait({waiting}, timeout=0.3)
        assert not done
        async with await _server(b"back", port):
            assert await waiting == b"back"


async def test_a_connection_is_closed_when_nobody_answers_in_time() -> None:
    door = socket.create_server(("127.0.0.1", 0))
    async with relay(door, _url(choose_port()), patience_s=0.1):
        assert await _heard(door) == b""
