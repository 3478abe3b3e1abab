"""A hostile agent: whatever it does to its port, another session's calls go on (promise 8)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from kat_stream.engines.client import MAX_STOP_BYTES, MAX_STOPS, EngineClient, Generation
from kat_stream.gateway.app import SessionHandle
from kat_stream.gateway.limits import Limits
from tests.contract.gateway_kit import World, saying, user, world
from tests.waiting import until
from topics import Sampling

pytestmark = pytest.mark.anyio

CHAT = "v1/chat/completions"
WIRES = {
    CHAT: {"model": "m", "messages": [user("go")]},
    "v1/messages": {"model": "m", "max_tokens": 9, "messages": [user("go")]},
    "v1/responses": {"model": "m", "input": "go"},
    "v1beta/models/m:generateContent": {"contents": [{"parts": [{"text": "go"}]}]},
}


def _message(path: str, body: dict[str, Any]) -> str:
    """The text of an error, in the shape of its wire."""
    assert isinstance(body["error"], dict) and ("type" in body) == (path == "v1/messages")
    return str(body["error"]["message"])


@pytest.mark.parametrize("path", sorted(WIRES))
async def test_garbage_is_refused_in_the_words_of_the_wire(path: str) -> None:
    async with world(saying("ls")) as w:
        handle = await w.session()
        for raw in (b"", b"not json", b"\xff\xfe\x00", b"[" * 100_000, b"7", b"{}", b'{"messages": 7, "input": 7}'):
            status, body = await w.post(handle, path, raw)
            assert status == 400 and _message(path, body), raw[:20]
        assert w.engines[0].requests == []


@pytest.mark.parametrize("path", sorted(WIRES))
@pytest.mark.parametrize("other", sorted(WIRES))
async def test_another_wires_body_is_refused_or_means_the_same(path: str, other: str) -> None:
    async with world(saying("ls")) as w:
        handle = await w.session()
        status, body = await w.post(handle, path, WIRES[other])
        # Plain texts are the same in OpenAI's and Anthropic's words.
        same = {path, other} == {CHAT, "v1/messages"} or path == other
        assert status == (200 if same else 400), body
        if path == CHAT and other == CHAT:
            foreign = {**WIRES["v1/messages"], "system": "Mend."}
            assert (await w.post(handle, CHAT, foreign))[1]["error"]["param"] == "system"


@pytest.mark.parametrize(
    ("path", "body", "where"),
    [
        ("v1/messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0]"),
        ("v1/messages", {"messages": [user("x")], "tools": [{"name": "a", "type": "bash_9"}]}, "tools[0].input_schema"),
        ("v1/messages", {"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ("v1/responses", {"input": [{"type": "item_reference"}]}, "input[0].type"),
        ("v1/responses", {"input": "x", "previous_response_id": "r"}, "previous_response_id"),
        ("v1/responses", {"input": "x", "tools": [{"type": "robot"}]}, "tools[0].type"),
        ("v1/responses", {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ("v1beta/models/m:generateContent", {"contents": [{"parts": [{"inlineData": {}}]}]}, "contents[0].parts[0]"),
        ("v1beta/models/m:generateContent", {"contents": [{"parts": [{"codeOutput": {}}]}]}, "contents[0].parts[0]"),
        (CHAT, {"messages": [user("x")], "input": "x"}, "input"),
    ],
)
async def test_what_cannot_be_served_is_named(path: str, body: dict[str, Any], where: str) -> None:
    async with world(saying("ls")) as w:
        status, answer = await w.post(await w.session(), path, body)
        assert status == 400 and where in _message(path, answer)


def _echoing(path: str, arguments: bytes) -> bytes:
    """A request whose history holds a call with these arguments, as an object."""
    body: dict[str, Any] = {
        CHAT: {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "ARGS"}}]}]},
        "v1/messages": {
            "messages": [
                {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": "ARGS"}]}
            ]
        },
        "v1beta/models/m:generateContent": {
            "contents": [{"role": "model", "parts": [{"functionCall": {"name": "f", "args": "ARGS"}}]}]
        },
    }[path]
    return json.dumps(body).encode().replace(b'"ARGS"', arguments)


@pytest.mark.parametrize("path", sorted(set(WIRES) - {"v1/responses"}))
async def test_arguments_of_an_echoed_call_are_text_or_refused(path: str) -> None:
    async with world(saying("ls")) as w:
        handle = await w.session()
        status, body = await w.post(handle, path, _echoing(path, b'{"c": "\xff"}'))
        assert status == 400 and "no valid JSON" in _message(path, body)
        assert (await w.post(handle, path, _echoing(path, b'{"n": 1e999}')))[0] == 200


async def test_arguments_as_text_that_nests_without_end_are_compared_as_text() -> None:
    async with world(saying("ls")) as w:
        nested = json.dumps("[" * 20_000).encode()
        assert (await w.post(await w.session(), CHAT, _echoing(CHAT, nested)))[0] == 200


@pytest.mark.parametrize(
    ("path", "field", "stops"),
    [
        (CHAT, "stop", "stop"),
        ("v1/messages", "stop_sequences", "stop_sequences"),
        ("v1beta/models/m:generateContent", "generationConfig.stopSequences", "stopSequences"),
    ],
)
async def test_stop_strings_that_every_token_would_be_searched_for_are_few_and_short(
    path: str, field: str, stops: str
) -> None:
    async with world(saying("ls")) as w:
        handle = await w.session()

        def asking(given: list[str]) -> dict[str, Any]:
            return {**WIRES[path], **({"generationConfig": {stops: given}} if "." in field else {stops: given})}

        most = [f"never {n:02d}" for n in range(MAX_STOPS)]
        for given in ([*most, "one more"], ["ß" * (MAX_STOP_BYTES // 2) + "x"]):
            status, answer = await w.post(handle, path, asking(given))
            assert status == 400 and _message(path, answer).startswith(f"{field}: "), answer
        assert w.engines[0].requests == []
        for given in ([*most, ""], ["ß" * (MAX_STOP_BYTES // 2)]):
            assert (await w.post(handle, path, asking(given)))[0] == 200


async def test_unknown_fields_are_ignored() -> None:
    async with world(saying("ls")) as w:
        handle = await w.session()
        for path, body in WIRES.items():
            assert (await w.post(handle, path, {**body, "x_new": {"a": [1]}, "safety_identifier": "u"}))[0] == 200


async def test_requests_after_the_end_are_told_so_on_every_wire() -> None:
    async with world(saying("ls")) as w:
        handle = await w.session()
        await w.control.close(handle.session_id)
        for path, body in WIRES.items():
            status, answer = await w.post(handle, path, body)
            assert (status, _message(path, answer)) == (409, "this session has ended")


async def test_a_tool_call_that_does_not_parse_is_text_and_flagged() -> None:
    said = 'Look.\n<tool_call>\n{"name": "bash", "arguments": {"command"\n</tool_call>'
    tools = [{"name": "bash", "input_schema": {"type": "object"}}]
    async with world(saying(said, "ca"), tools="hermes") as w:
        handle = await w.session()
        body = {"messages": [user("go")], "tools": tools}
        _, answer = await w.post(handle, "v1/messages", body)
        assert answer["content"] == [{"type": "text", "text": said}] and answer["stop_reason"] == "end_turn"
        echoed = {"role": "assistant", "content": answer["content"]}
        await w.post(handle, "v1/messages", {**body, "messages": [user("go"), echoed, user("on")]})
        turns = await w.control.close(handle.session_id)
        assert [turn.ill_formed for turn in turns] == [True, False]
        assert [turn.fork for turn in turns] == ["", ""] and turns[0].trainable


async def test_ids_of_calls_that_are_used_twice_change_nothing() -> None:
    said = '<tool_call>\n{"name": "bash", "arguments": {}}\n</tool_call>'
    tools = [{"type": "function", "function": {"name": "bash"}}]
    async with world(saying(said, said, "ca"), tools="hermes") as w:
        handle = await w.session()
        messages: list[Any] = [user("go")]
        for _ in range(3):
            _, answer = await w.post(handle, CHAT, {"messages": messages, "tools": tools})
            message = answer["choices"][0]["message"]
            calls = [{**call, "id": "same"} for call in message.get("tool_calls", [])]
            messages += [{**message, "tool_calls": calls}, {"role": "tool", "tool_call_id": "same", "content": "x"}]
        assert [turn.fork for turn in await w.control.close(handle.session_id)] == ["", "", ""]


class _TextOnly(EngineClient):
    """An engine that gives no ids."""

    async def generate(self, *args: Any, **more: Any) -> Generation:
        whole = await super().generate(*args, **more)
        return Generation(
            output_ids=[], logprobs=[], finish_reason="stop", matched=None, cached_tokens=0,
            prompt_tokens=whole.prompt_tokens, spans=[], seconds=0.0, text="ls",
        )  # fmt: skip


async def test_an_engine_that_returns_text_without_ids_gives_no_reply() -> None:
    async with world(saying("ls")) as w:
        handle = await w.session()
        state = w.router.list()[0]
        state.engine = _TextOnly(state.url, w.http)
        status, body = await w.post(handle, CHAT, WIRES[CHAT])
        assert status == 503 and "without the ids" in body["error"]["message"]
        assert await w.control.close(handle.session_id) == []


async def _honest(w: World, handle: SessionHandle, seconds: float = 10.0) -> None:
    with anyio.fail_after(seconds):
        status, body = await w.post(handle, CHAT, WIRES[CHAT])
    assert status == 200, body


async def test_a_body_of_a_gigabyte_is_refused_without_being_kept() -> None:
    async with world(saying("ls")) as w:
        mine, other = await w.session(), await w.session()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        async def giant() -> AsyncIterator[bytes]:
            for _ in range(1024):
                yield b"x" * (1 << 20)

        for key, expected in ((mine.key, 413), ("wrong", 401)):
            url = f"{w.server.data_url}{mine.path}/{CHAT}"
            try:
                async with w.http.post(url, data=giant(), headers={"Authorization": f"Bearer {key}"}) as answer:
                    assert answer.status == expected
            except OSError:
                pass  # the gateway closed the connection while the client was still sending
        await _honest(w, other)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 128 * 1024, f"{grown} KiB"


async def test_bodies_of_a_session_are_bounded_together() -> None:
    async with world(saying("ls"), limits=Limits(session_body_bytes=100_000, body_s=5.0)) as w:
        mine, other = await w.session(), await w.session()
        go_on = anyio.Event()

        async def held() -> AsyncIterator[bytes]:
            yield b'{"messages": "' + b"x" * 80_000
            await go_on.wait()

        async def first() -> None:
            headers = {"Authorization": f"Bearer {mine.key}"}
            async with w.http.post(f"{w.server.data_url}{mine.path}/{CHAT}", data=held(), headers=headers) as answer:
                assert answer.status == 400

        async with anyio.create_task_group() as group:
            group.start_soon(first)
            refused = await _until_refused(w, mine)
            assert refused["error"]["code"] == "rate_limit_exceeded"
            await _honest(w, other)
            go_on.set()
        await _honest(w, mine)


async def _until_refused(w: World, handle: SessionHandle) -> dict[str, Any]:
    """Send bodies until one is refused because another one takes the room."""
    give_up = time.monotonic() + 10
    while True:
        status, body = await w.post(handle, CHAT, b"y" * 50_000)
        if status == 429:
            return body
        assert status == 400 and time.monotonic() < give_up


async def test_a_cut_upload_leaves_nothing() -> None:
    async with world(saying("ls")) as w:
        handle = await w.session()
        reader, writer = await _connect(w)
        head = f"POST {handle.path}/{CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {handle.key}\r\n"
        writer.write(head.encode() + b'Content-Length: 1000\r\n\r\n{"messages": [')
        await writer.drain()
        writer.close()
        await _honest(w, handle)
        (turn,) = await w.control.close(handle.session_id)
        assert turn.finish_reason == "stop" and len(w.engines[0].requests) == 1
        assert reader is not None


async def test_a_flood_of_a_session_is_slowed_and_harms_no_other() -> None:
    async with world(saying("ls"), limits=Limits(requests_per_s=5.0, request_burst=20)) as w:
        mine, other = await w.session(Sampling(max_turns=1000)), await w.session()
        answers: list[int] = []

        async def flood() -> None:
            answers.extend([(await w.post(mine, CHAT, b"garbage"))[0] for _ in range(25)])

        async with anyio.create_task_group() as group:
            for _ in range(8):
                group.start_soon(flood)
            for _ in range(5):
                await _honest(w, other)
        assert set(answers) == {400, 429} and answers.count(400) < 60
        url, key = f"{w.server.data_url}{mine.path}/v1/models", {"Authorization": f"Bearer {mine.key}"}
        async with w.http.get(url, headers=key) as answer:
            assert answer.status in (200, 429)
            assert answer.status == 200 or answer.headers["Retry-After"] == "1"


async def _connect(w: World) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = w.server.data_url.removeprefix("http://").split(":")
    return await asyncio.open_connection(host, int(port))


async def test_ten_thousand_connections_and_dribbled_heads_shut_nobody_out() -> None:
    limits = Limits(connections=64, headers_s=1.0)
    async with world(saying("ls"), limits=limits) as w:
        handle = await w.session()
        await _honest(w, handle)
        host, port = w.server.data_url.removeprefix("http://").split(":")
        held: list[socket.socket] = []
        for number in range(10_000):
            attacker = socket.socket()
            attacker.setblocking(False)
            attacker.connect_ex((host, int(port)))
            held.append(attacker)
            if len(held) > 100:
                with contextlib.suppress(OSError):  # the gateway closed it, or has not accepted it yet
                    held[50].send(b"POST /s/x HTTP/1.1\r\nX-Slow: ")
                held.pop(0).close()
            if number % 100 == 0:
                await anyio.lowlevel.checkpoint()
            if number % 2500 == 0:
                await _honest(w, handle)
        await _honest(w, handle)
        # Who never finishes a head is closed: the rest of them are gone soon after.
        reader, writer = await _connect(w)
        writer.write(b"GET /s/x")
        with anyio.fail_after(60):
            with pytest.raises(ConnectionError):
                assert await reader.read(1) == b""
                raise ConnectionResetError
        for attacker in held:
            attacker.close()


@pytest.mark.parametrize(
    "raw",
    [b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"\x00" * 5000, b"POST / HTTP/9.9\r\n\r\n", b"A" * 100_000],
)
async def test_bytes_that_are_no_http_end_the_connection(raw: bytes) -> None:
    async with world(saying("ls"), limits=Limits(headers_s=0.5)) as w:
        handle = await w.session()
        reader, writer = await _connect(w)
        writer.write(raw)
        with anyio.fail_after(60):
            try:
                answer = await reader.read()
            except ConnectionError:
                answer = b""
        assert not answer or answer.startswith(b"HTTP/1.")
        writer.transport.abort()
        await _honest(w, handle)


async def test_sessions_cannot_be_told_apart_from_nothing_by_guessing() -> None:
    async with world(saying("ls")) as w:
        mine, other = await w.session(), await w.session()
        paths = [
            "/s/../sessions",
            f"/s/{other.session_id}/v1/models",
            "/s//v1/models",
            "/sessions",
            "/s/%2e%2e/metrics",
        ]
        for path in paths:
            async with w.http.get(w.server.data_url + path, headers={"Authorization": f"Bearer {mine.key}"}) as answer:
                assert answer.status in (401, 404), path
                assert other.key not in await answer.text()
        for key in ("", "é", "x" * 5_000, other.key[:-1], mine.key.upper()):
            status, body = await w.post(other, CHAT, WIRES[CHAT], **{"x-api-key": key, "Authorization": ""})
            assert status in (400, 401), json.dumps(body)
        await until(lambda: w.engines[0].requests == [])
