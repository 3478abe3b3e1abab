"""Streams: what agents see while a reply grows, and that its end waits for the record (promise 1)."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable
from typing import Any

import anyio
import pytest

from kat_stream.gateway.limits import Limits
from kat_stream.log import Message
from tests.contract.gateway_kit import Gates, World, by_bytes, paths, saying, user, world
from tests.waiting import until
from topics import Sampling

pytestmark = pytest.mark.anyio

TOOLS = [{"type": "function", "function": {"name": "bash", "parameters": {"type": "object", "properties": {}}}}]


async def test_a_stream_says_what_a_whole_reply_says() -> None:
    async with world(saying("ls -la grüße 😀", "ca"), token_s=0.001, limits=Limits(stream_tokens=1)) as w:
        handle = await w.session()
        client = w.client(handle)
        stream = await client.chat.completions.create(
            model="m", messages=[user("go")], stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        deltas = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
        assert "".join(deltas) == "ls -la grüße 😀" and len([delta for delta in deltas if delta]) > 3
        assert not any("\ufffd" in delta for delta in deltas)
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
        assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == len(by_bytes("ls -la grüße 😀"))
        history = [user("go"), {"role": "assistant", "content": "".join(deltas)}, user("on")]
        await client.chat.completions.create(model="m", messages=history)
        turns = await w.control.close(handle.session_id)
        assert (turns[1].parent, turns[1].fork) == (turns[0].turn_id, "")
        assert paths(turns)[turns[0].turn_id][1] == by_bytes("ls -la grüße 😀")


async def test_a_long_reply_is_read_in_few_pieces() -> None:
    """Each piece holds all before it: one for each token would cost the square of the reply's length."""
    said = "and so it goes on " * 10
    async with world(saying(said, said), token_s=0.0005) as w:
        client = w.client(await w.session())
        stream = await client.chat.completions.create(model="m", messages=[user("go")], stream=True)
        deltas = [chunk.choices[0].delta.content async for chunk in stream if chunk.choices[0].delta.content]
        await client.chat.completions.create(model="m", messages=[user("whole")])
        streamed, whole = w.engines[0].requests
        each = Limits().stream_tokens
        assert "".join(deltas) == said and 2 < len(deltas) <= 2 + len(by_bytes(said)) / each
        assert (streamed.sampling_params.stream_interval, whole.sampling_params.stream_interval) == (each, 1)


async def test_tool_calls_are_held_back_and_come_whole() -> None:
    said = 'Look. \n\n<tool_call>\n{"name": "bash", "arguments": {"command": "ls"}}\n</tool_call>'
    async with world(saying(said), tools="hermes", token_s=0.0005) as w:
        handle = await w.session()
        stream = await w.client(handle).chat.completions.create(
            model="m", messages=[user("go")], tools=TOOLS, stream=True
        )
        choices = [chunk.choices[0] async for chunk in stream]
        assert "".join(choice.delta.content or "" for choice in choices) == "Look."
        calls = [call for choice in choices for call in choice.delta.tool_calls or ()]
        assert [(call.index, call.function and call.function.name) for call in calls] == [(0, "bash")]
        assert calls[0].function is not None and json.loads(calls[0].function.arguments or "") == {"command": "ls"}
        assert choices[-1].finish_reason == "tool_calls"


async def test_text_that_only_looked_like_a_tool_call_is_shown_in_the_end() -> None:
    said = "a <tool_cal b <tool_call> c"
    async with world(saying(said), tools="hermes", token_s=0.0005) as w:
        handle = await w.session()
        stream = await w.client(handle).chat.completions.create(
            model="m", messages=[user("go")], tools=TOOLS, stream=True
        )
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == said


async def _lines(w: World, path: str, key: str, into: list[str]) -> None:
    body = {"model": "m", "messages": [user("go")], "stream": True}
    url = f"{w.server.data_url}{path}/v1/chat/completions"
    async with w.http.post(url, json=body, headers={"Authorization": f"Bearer {key}"}) as answer:
        while line := await answer.content.readline():
            into.append(line.decode().strip())


async def test_the_end_of_a_stream_waits_for_the_acknowledgement() -> None:
    gate = Gates()
    async with world(saying("ls"), limits=Limits(keepalive_s=0.02), wrap=gate) as w:
        handle = await w.session()
        lines: list[str] = []
        async with anyio.create_task_group() as group:
            group.start_soon(_lines, w, handle.path, handle.key, lines)
            await until(lambda: lines.count(": keepalive") >= 3)
            assert gate[0].waiting == 1 and await w.published() == []
            assert any('"content":"ls"' in line for line in lines)
            assert not any("[DONE]" in line or '"finish_reason":"stop"' in line for line in lines)
            gate[0].open.set()
        assert lines[-2] == "data: [DONE]"
        assert len(await w.published()) == 1


async def test_a_whole_reply_waits_for_the_acknowledgement() -> None:
    gate = Gates()
    async with world(saying("ls"), wrap=gate) as w:
        handle = await w.session()
        answered: list[str] = []

        async def agent() -> None:
            answer = await w.client(handle).chat.completions.create(model="m", messages=[user("go")])
            assert len(await w.published()) == 1
            answered.append(answer.choices[0].message.content or "")

        async with anyio.create_task_group() as group:
            group.start_soon(agent)
            await until(lambda: gate[0].waiting == 1)
            assert answered == []
            gate[0].open.set()
        assert answered == ["ls"]


async def test_a_stream_cut_by_length_says_so() -> None:
    async with world(saying("ls -la")) as w:
        handle = await w.session(Sampling(max_new_tokens=2))
        stream = await w.client(handle).chat.completions.create(model="m", messages=[user("go")], stream=True)
        choices = [chunk.choices[0] async for chunk in stream]
        assert ("".join(choice.delta.content or "" for choice in choices), choices[-1].finish_reason) == (
            "ls",
            "length",
        )


class _Broken:
    """A log whose client has a defect."""

    async def append(self, *messages: Message, deadline_s: float = 30.0) -> None:
        raise ZeroDivisionError


ASKED = {"model": "m", "max_tokens": 99, "stream": True}
STREAMS: dict[str, dict[str, Any]] = {
    "v1/chat/completions": {**ASKED, "messages": [user("go")]},
    "v1/messages": {**ASKED, "messages": [user("go")]},
    "v1/responses": {**ASKED, "input": "go"},
    "v1beta/models/m:streamGenerateContent": {"contents": [{"parts": [{"text": "go"}]}]},
}


@pytest.mark.parametrize("path", sorted(STREAMS))
async def test_a_defect_behind_the_head_of_a_stream_ends_it_in_its_own_words(path: str) -> None:
    async with world(saying("ls -la"), token_s=0.001, wrap=lambda _log: _Broken()) as w:
        handle = await w.session()
        url, key = f"{w.server.data_url}{handle.path}/{path}", {"Authorization": f"Bearer {handle.key}"}
        with anyio.fail_after(30):
            for _ in range(2):  # and the connection serves the next request
                async with w.http.post(url, json=STREAMS[path], headers=key) as answer:
                    said = await answer.text()
                assert answer.status == 200
                assert said.count("a defect of the gateway") == 1 and "HTTP/1.1" not in said


async def test_a_client_that_takes_nothing_is_cut_off_in_time() -> None:
    said = "ls -la " * 40_000
    async with world(saying(said), limits=Limits(write_s=0.2)) as w:
        handle = await w.session(Sampling(max_new_tokens=500_000, max_context=600_000))
        body = json.dumps({"messages": [user("go")], "stream": True}).encode()
        head = f"POST {handle.path}/v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        listener, connections = _agents_port(w)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(listener.getsockname())
            client.sendall(f"{head}Authorization: Bearer {handle.key}\r\n\r\n".encode() + body)
            await until(lambda: len(connections()) == 1)
            await until(lambda: not connections())
            client.settimeout(10)
            assert _all_of(client).count(b"HTTP/1.1") == 1
        (turn,) = await w.control.close(handle.session_id)
        assert (turn.content, turn.finish_reason) == (said, "stop")


def _agents_port(w: World) -> tuple[Any, Callable[[], list[Any]]]:
    """The listening socket, and the connections that it made."""
    runner = w.server._runners[0]
    (site,) = runner.sites
    return site._server.sockets[0], lambda: runner.server.connections  # type: ignore[attr-defined, union-attr]


def _all_of(client: socket.socket) -> bytes:
    """What lies in the socket of a connection that was cut."""
    out = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := client.recv(65536):
            out += piece
    return out
