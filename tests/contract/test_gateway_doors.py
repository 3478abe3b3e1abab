"""Who may ask what, and what bad input is told: keys, paths, sizes, limits, both listeners (promises 7 and 8)."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import anyio
import msgspec
import openai
import pytest

from kat_stream.config import GatewaySection
from kat_stream.errors import ConfigError, GatewayError
from kat_stream.gateway.app import GatewayControl, SessionHandle, start_gateway
from kat_stream.gateway.limits import Limits
from tests.contract.gateway_kit import World, saying, tokenizer, user, world
from tests.waiting import until
from topics import Sampling

pytestmark = pytest.mark.anyio


async def _post(w: World, handle: SessionHandle, body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
    url = f"{w.server.data_url}{handle.path}/v1/chat/completions"
    async with w.http.post(url, data=body, headers={"Authorization": f"Bearer {handle.key}", **headers}) as answer:
        return answer.status, json.loads(await answer.read())["error"]


async def test_a_key_opens_its_own_session_and_nothing_else() -> None:
    async with world(saying("ls")) as w:
        mine, other = await w.session(), await w.session()
        with pytest.raises(openai.AuthenticationError) as refused:
            await w.client(mine, key=other.key).chat.completions.create(model="m", messages=[user("go")])
        assert refused.value.code == "invalid_api_key"
        nowhere = msgspec.structs.replace(mine, path="/s/nowhere")
        with pytest.raises(openai.NotFoundError) as missing:
            await w.client(nowhere).chat.completions.create(model="m", messages=[user("go")])
        assert missing.value.code == "session_not_found"
        assert [model.id async for model in w.client(mine).models.list()] == ["policy", "policy-small"]
        assert w.engines[0].requests == []


async def test_the_agents_port_opens_no_session_and_shows_none() -> None:
    async with world(saying("ls")) as w:
        handle = await w.session()
        for method, path in (("POST", "/sessions"), ("GET", "/sessions"), ("GET", "/metrics"), ("GET", "/health")):
            async with w.http.request(method, w.server.data_url + path) as answer:
                assert answer.status == 404 and (await answer.json())["error"]["code"] == "not_found"
        close = f"{w.server.data_url}/sessions/{handle.session_id}/close"
        async with w.http.post(close) as answer:
            assert answer.status == 404
        async with w.http.get(f"{w.server.data_url}{handle.path}/v1/responses", headers={"Upgrade": "websocket"}) as up:
            assert up.status == 426
        async with w.http.head(w.server.data_url + handle.path) as head:
            assert head.status == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"not json", None),
        (b"\xff\xfe", None),
        (b"[" * 100_000, None),
        (b"{}", None),
        (b'{"messages": []}', "messages"),
        (b'{"messages": [{"role": "robot", "content": "x"}]}', "messages[0].role"),
        (b'{"messages": [{"role": "user", "content": 7}]}', "messages[0].content"),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": "hot"}', "temperature"),
        (b'{"messages": [{"role": "user", "content": "x"}], "n": 2}', "n"),
        (b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 0}', "max_tokens"),
        (b'{"messages": [{"role": "user", "content": "x"}], "tools": [{}]}', "tools[0].function.name"),
        (
            b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}',
            "messages[0].content[0]",
        ),
    ],
)
async def test_bad_bodies_are_refused_by_name(body: bytes, param: str | None) -> None:
    async with world(saying("ls")) as w:
        handle = await w.session()
        status, error = await _post(w, handle, body)
        assert (status, error["param"], error["type"]) == (400, param, "invalid_request_error")
        assert w.engines[0].requests == [] and await w.control.close(handle.session_id) == []


async def test_sizes_and_numbers_are_bounded() -> None:
    async with world(saying("ls " * 200), token_s=0.01, limits=Limits(body_bytes=10_000, calls_per_session=2)) as w:
        handle = await w.session()
        assert (await _post(w, handle, b"x" * 20_000))[0] == 413
        body = msgspec.json.encode({"messages": [user("go")]})
        async with anyio.create_task_group() as group:
            for _ in range(2):
                group.start_soon(_post_quietly, w, handle, body)
            await until(lambda: w.engines[0].in_flight == 2)
            status, error = await _post(w, handle, body)
            assert (status, error["code"]) == (429, "rate_limit_exceeded")
            await w.control.close(handle.session_id)


async def _post_quietly(w: World, handle: SessionHandle, body: bytes) -> None:
    status, _ = await _post(w, handle, body)
    assert status == 409


async def test_requests_that_are_still_read_are_bounded_too() -> None:
    async with world(saying("ls"), limits=Limits(requests_per_session=1, body_s=0.3)) as w:
        handle = await w.session()

        async def slow() -> AsyncIterator[bytes]:
            yield b'{"messages":'
            (done,) = [await _post(w, handle, b"{}")]
            assert (done[0], done[1]["code"]) == (429, "rate_limit_exceeded")
            await anyio.sleep(0.6)  # longer than the gateway waits for a body: the wait itself is what is tested

        url = f"{w.server.data_url}{handle.path}/v1/chat/completions"
        async with w.http.post(url, data=slow(), headers={"Authorization": f"Bearer {handle.key}"}) as answer:
            assert answer.status == 408


async def test_keys_stand_in_no_record_and_no_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    async with world(saying("ls"), limits=Limits(call_s=0.3)) as w:
        handle = await w.session()
        await w.client(handle).chat.completions.create(model="m", messages=[user("go")])
        (turn,) = await w.published()
        await w.engines[0].close()
        await _post(w, handle, msgspec.json.encode({"messages": [user("on")]}))
        assert handle.key.encode() not in msgspec.msgpack.encode(turn)
        assert handle.key not in repr(handle)
        assert not [line for line in caplog.messages if handle.key in line]


@pytest.mark.parametrize("sampling", [Sampling(max_new_tokens=0), Sampling(max_context=1)])
async def test_a_session_that_could_never_speak_is_refused(sampling: Sampling) -> None:
    async with world(saying("ls")) as w:
        with pytest.raises(GatewayError, match="max_new_tokens must be at least 1"):
            await w.session(sampling)


async def test_a_context_that_is_full_is_told_in_openais_words() -> None:
    async with world(saying("ls")) as w:
        handle = await w.session(Sampling(max_context=60))
        client = w.client(handle)
        with pytest.raises(openai.BadRequestError, match="maximum context length is 60 tokens") as refused:
            await client.chat.completions.create(model="m", messages=[user("x" * 100)])
        assert refused.value.code == "context_length_exceeded"
        await client.chat.completions.create(model="m", messages=[user("go")], max_tokens=32000)
        seen = w.engines[0].requests[0]
        assert seen.sampling_params.max_new_tokens == 60 - len(seen.input_ids)


async def test_turns_and_sessions_end() -> None:
    async with world(saying("ls"), limits=Limits(sessions=1)) as w:
        handle = await w.session(Sampling(max_turns=1))
        with pytest.raises(GatewayError, match="503"):
            await w.session()
        client = w.client(handle)
        await client.chat.completions.create(model="m", messages=[user("go")])
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(model="m", messages=[user("go")])
        assert refused.value.code == "turn_limit_reached"
        await w.control.close(handle.session_id)
        with pytest.raises(openai.ConflictError):
            await client.chat.completions.create(model="m", messages=[user("go")])


async def test_evaluations_are_recorded_and_not_trained() -> None:
    async with world(saying("ls")) as w:
        handle = await w.session(purpose="eval")
        await w.client(handle).chat.completions.create(model="m", messages=[user("go")])
        (turn,) = await w.control.close(handle.session_id)
        assert not turn.trainable and turn.finish_reason == "stop"


async def test_the_workers_port_and_its_client() -> None:
    async with world(saying("ls")) as w:
        handle = await w.session()
        (status,) = await w.control.sessions()
        assert (status.session_id, status.turns, status.in_flight) == (handle.session_id, 0, 0)
        async with w.http.get(w.server.control_url + "/sessions") as answer:
            assert handle.key not in await answer.text()
        async with w.http.get(w.server.control_url + "/metrics") as answer:
            assert "kat_gateway_sessions 1.0" in await answer.text()
        for body, message in ((b'{"run": 1}', "run"), (b"nonsense", "malformed")):
            async with w.http.post(w.server.control_url + "/sessions", data=body) as answer:
                assert answer.status == 400 and message in await answer.text()
        with pytest.raises(GatewayError, match="404"):
            await w.control.close("nowhere")
        assert await w.control.healthy()
        assert not await GatewayControl("http://127.0.0.1:1", w.http).healthy()


async def test_sessions_that_nobody_uses_are_closed() -> None:
    async with world(saying("ls"), limits=Limits(idle_s=0.05)) as w:
        handle = await w.session()

        async def nobody() -> bool:
            return await w.control.sessions() == []

        await until(nobody, "the session closed")
        assert await w.control.close(handle.session_id) == []


async def test_a_port_in_use_and_an_unknown_parser_are_configuration_errors() -> None:
    async with world(saying("ls")) as w:
        port = int(w.server.data_url.rsplit(":", 1)[1])
        for config, message in ((GatewaySection(port=port), "gateway.port"), (GatewaySection(tools="x"), "hermes")):
            with pytest.raises(ConfigError, match=message):
                await start_gateway(
                    tokenizer=tokenizer(), log=w.log, router=w.router, config=config, model_name="policy"
                )
