"""The client against a listener that misbehaves in every way a network can."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import aiohttp
import pytest

from kat_stream.engines.client import EngineClient, SamplingParams
from kat_stream.errors import DeadlineExceeded, EngineRejected, EngineUnavailable

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def reply(status: str, body: bytes, *, length: int | None = None) -> Talk:
    """A talk that answers one request and closes; a `length` beyond the body breaks off in mid-answer."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        # All of the request is read: closing with unread bytes would reset the connection before the answer is seen.
        await reader.readexactly(int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0]))
        size = len(body) if length is None else length
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {size}\r\nConnection: close\r\n\r\n".encode() + body)
        await writer.drain()

    return talk


@asynccontextmanager
async def listening(talk: Talk) -> AsyncIterator[EngineClient]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await talk(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, aiohttp.ClientSession() as session:
        yield EngineClient(f"http://127.0.0.1:{port}/", session)


async def ask(client: EngineClient, seconds: float = 5.0) -> list[int]:
    return (await client.generate([1], SamplingParams(), rid="r", deadline_s=seconds)).output_ids


def check(talk: Talk, error: type[Exception], match: str, seconds: float = 5.0) -> None:
    async def run() -> None:
        async with listening(talk) as client:
            with pytest.raises(error, match=match):
                await ask(client, seconds)
            with pytest.raises(error):
                async for _ in client.generate_stream([1], SamplingParams(), rid="r", deadline_s=seconds):
                    pass

    asyncio.run(run())


async def _silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def _reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.transport.abort()


def test_a_4xx_is_a_rejection_with_the_engines_words() -> None:
    check(reply("400 Bad Request", b'{"error":{"message":"too long"}}'), EngineRejected, "400: too long")
    check(reply("422 Odd", b'{"detail":"no"}'), EngineRejected, "422")


def test_a_5xx_a_reset_and_a_cut_answer_are_retriable() -> None:
    check(reply("503 Busy", b'{"error":{"message":"starting"}}'), EngineUnavailable, "starting")
    check(_reset, EngineUnavailable, "generate")
    check(reply("200 OK", b'{"text":""', length=500), EngineUnavailable, "generate")
    assert EngineUnavailable.retriable and not EngineRejected.retriable


def test_an_answer_of_another_shape_is_not_taken_for_a_generation() -> None:
    check(reply("200 OK", b"<html>proxy</html>"), EngineUnavailable, "not the contract")
    check(reply("200 OK", b'{"output_ids":[1],"meta_info":{}}'), EngineUnavailable, "finish reason")


def test_an_engine_side_failure_inside_a_200_is_an_error() -> None:
    finish = b'{"type":"abort","message":"oom","status_code":500,"err_type":"X"}'
    check(reply("200 OK", b'{"output_ids":[],"meta_info":{"finish_reason":' + finish + b"}}"), EngineUnavailable, "oom")


def test_silence_ends_at_the_deadline() -> None:
    check(_silent, DeadlineExceeded, "generate", seconds=0.2)
    assert DeadlineExceeded.retriable


def test_a_refused_connection_is_retriable_and_health_says_no() -> None:
    async def run() -> None:
        server = await asyncio.start_server(_silent, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        server.close()
        await server.wait_closed()
        async with aiohttp.ClientSession() as session:
            client = EngineClient(f"http://127.0.0.1:{port}", session)
            with pytest.raises(EngineUnavailable):
                await ask(client)
            assert not await client.health()

    asyncio.run(run())


def test_a_span_is_made_up_for_engines_that_name_only_one_version() -> None:
    body = b"""{"output_ids":[5,6],"meta_info":{"finish_reason":{"type":"stop","matched":6},"prompt_tokens":3,
        "weight_version":"v3","output_token_logprobs":[[-0.5,5,null],[-1.5,6,null]]}}"""

    async def run() -> None:
        async with listening(reply("200 OK", body)) as client:
            answer = await client.generate([1, 2, 3], SamplingParams(), rid="r", deadline_s=5)
        assert answer.logprobs == [-0.5, -1.5]
        assert (answer.finish_reason, answer.matched) == ("stop", 6)
        assert [(span.version, span.start, span.end) for span in answer.spans] == [("v3", 0, 2)]

    asyncio.run(run())


def test_the_client_needs_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, kat_stream.engines.client; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def _streaming(connections: list[int], *, ends: bool) -> Talk:
    """A talk that streams an answer to each request of its connection; the stream's end comes 20 ms later, or never."""
    finish = b'{"output_ids":[7],"meta_info":{"finish_reason":{"type":"stop"},"output_token_logprobs":[[-0.5,7,null]]}}'
    event = b"data: " + finish + b"\n\n"
    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (len(event), event)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(0)
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                await reader.readexactly(int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0]))
                writer.write(answer)
                await writer.drain()
                connections[-1] += 1
                if ends:
                    await asyncio.sleep(0.02)
                    writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")

    return talk


async def _streamed(client: EngineClient) -> list[int]:
    parts = [part async for part in client.generate_stream([1], SamplingParams(), rid="r", deadline_s=5.0)]
    assert parts[-1].final is not None
    return parts[-1].final.output_ids


@pytest.mark.parametrize(("ends", "served"), [(True, [3]), (False, [1, 1, 1])])
def test_a_streams_connection_serves_the_next_call_if_the_stream_ends(ends: bool, served: list[int]) -> None:
    """Also when its end comes after its answer; without an end the answer is as good, and the connection is closed."""

    async def run() -> None:
        connections = list[int]()
        async with listening(_streaming(connections, ends=ends)) as client:
            assert [await _streamed(client) for _ in range(3)] == [[7]] * 3
        assert connections == served

    asyncio.run(run())
