"""What a hostile or an old client may do with HTTP itself: it is answered, leaves no line, shuts out only itself."""

from __future__ import annotations

import asyncio
import gzip
import json

import anyio
import pytest

from kat_stream.gateway.app import SessionHandle
from kat_stream.gateway.limits import Limits
from tests.contract.gateway_kit import World, saying, user, world

pytestmark = pytest.mark.anyio

BODY = json.dumps({"model": "m", "messages": [user("go")]}).encode()


def _head(handle: SessionHandle, *lines: str, version: str = "1.1", method: str = "POST") -> bytes:
    first = f"{method} {handle.path}/v1/chat/completions HTTP/{version}"
    return "\r\n".join([first, "Host: x", f"Authorization: Bearer {handle.key}", *lines, "", ""]).encode()


async def _connect(w: World) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = w.server.data_url.removeprefix("http://").split(":")
    return await asyncio.open_connection(host, int(port))


async def _answer(w: World, *parts: bytes) -> bytes:
    """What comes back until the gateway has said what it says, each part sent once the one before was answered."""
    reader, writer = await _connect(w)
    said = b""
    with anyio.fail_after(30):
        for part in parts:
            writer.write(part)
            said += await reader.read(1 << 16)
    writer.transport.abort()
    return said


async def test_a_client_that_waits_to_be_told_to_send_its_body_is_told() -> None:
    async with world(saying("ls"), limits=Limits(body_s=5.0)) as w:
        handle = await w.session()
        head = _head(handle, "Expect: 100-continue", f"Content-Length: {len(BODY)}")
        said = await _answer(w, head, BODY)
        assert said.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK") and b'"ls"' in said
        assert (await _answer(w, head + BODY)).startswith(b"HTTP/1.1 200 OK")
        refused = _head(handle, "Expect: 100-continue", "Content-Length: 9").replace(handle.key.encode(), b"wrong")
        assert (await _answer(w, refused)).startswith(b"HTTP/1.1 401")


async def test_http_1_0_is_served() -> None:
    async with world(saying("ls")) as w:
        head = _head(await w.session(), f"Content-Length: {len(BODY)}", version="1.0")
        assert (await _answer(w, head + BODY)).startswith(b"HTTP/1.0 200")


@pytest.mark.parametrize(
    ("lines", "body", "status"),
    [
        (["Content-Encoding: gzip", f"Content-Length: {len(BODY)}"], BODY, 400),
        (["Transfer-Encoding: chunked"], b"ZZ\r\nxx\r\n", 400),
        (["Transfer-Encoding: chunked"], b'5\r\n{"mes\r\n', 408),
        (["Transfer-Encoding: chunked", "Content-Length: 5"], b"0\r\n\r\n", 400),
        (["Content-Length: 5", "Content-Length: 6"], b"hello", 400),
        ([f"X: {'y' * 20_000}"], b"", 400),
        ([f"X{number}: y" for number in range(20_000)], b"", 400),
        (["Bad\x00Name: x"], b"", 400),
        (["X-Api-Key: KEY\x00"], b"", 400),
    ],
)
async def test_what_is_no_http_is_answered_and_leaves_no_line(
    lines: list[str], body: bytes, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with world(saying("ls"), limits=Limits(body_s=0.2)) as w:
        handle = await w.session()
        said = await _answer(w, _head(handle, *[line.replace("KEY", handle.key) for line in lines]) + body)
        assert said.split(b" ")[1] == str(status).encode(), said
        assert handle.key not in caplog.text and caplog.records == []
        assert (await w.post(handle, "v1/chat/completions", BODY))[0] == 200


async def test_a_body_that_unpacks_to_a_gigabyte_is_too_large() -> None:
    async with world(saying("ls"), limits=Limits(body_bytes=1 << 20)) as w:
        packed = gzip.compress(bytes(1 << 24))
        head = _head(await w.session(), "Content-Encoding: gzip", f"Content-Length: {len(packed)}")
        assert (await _answer(w, head + packed)).startswith(b"HTTP/1.1 413")


async def test_connections_that_show_a_key_shut_out_only_their_own_session() -> None:
    limits = Limits(connections=40, session_connections=8, request_burst=1000)
    async with world(saying("ls"), limits=limits) as w:
        mine, other = await w.session(), await w.session()
        models = f"GET {mine.path}/v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {mine.key}\r\n\r\n".encode()
        held = []
        for _ in range(100):
            reader, writer = await _connect(w)
            writer.write(models)
            with anyio.fail_after(30):
                assert (await reader.read(1 << 16)).startswith(b"HTTP/1.1 200")
            held.append((reader, writer))
        for handle in (other, mine):
            assert (await w.post(handle, "v1/chat/completions", BODY))[0] == 200
        newest, writer = held[-1]
        writer.write(models)
        with anyio.fail_after(30):
            assert await newest.read(1 << 16)
            with pytest.raises(ConnectionError):
                await held[0][0].read()
                raise ConnectionResetError
        for _, writer in held:
            writer.transport.abort()
