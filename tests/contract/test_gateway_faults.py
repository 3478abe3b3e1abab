"""Trouble: clients that go away, engines that die or pause, a log that is away. One reply, or a clear error."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal

import anyio
import openai
import pytest

from kat_stream.engines.client import EngineClient, Generation, Increment, SamplingParams, Span
from kat_stream.errors import LogUnavailable
from kat_stream.gateway.app import SessionHandle
from kat_stream.gateway.calls import Call, CallService
from kat_stream.gateway.limits import Limits
from kat_stream.gateway.recording import Publisher
from kat_stream.log import Message
from kat_stream.log.kafka_producer import _digest
from kat_stream.routing import router
from tests.contract.gateway_kit import Gates, World, by_bytes, going_on, paths, saying, tokenizer, user, world
from tests.waiting import until

pytestmark = pytest.mark.anyio


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Calls whose last client is known to have gone away."""
    seen: list[Call] = []
    real = CallService.unwatched

    def unwatched(self: CallService, call: Call) -> None:
        real(self, call)
        seen.append(call)

    monkeypatch.setattr(CallService, "unwatched", unwatched)
    return seen


QUICK = Limits(disconnect_grace_s=0.05, publish_s=0.3, keepalive_s=0.05)


class Away:
    """A log that never acknowledges."""

    async def append(self, *messages: Message, deadline_s: float = 30.0) -> None:
        raise LogUnavailable("no broker")


class Unheard:
    """A log of which the first acknowledgements are lost."""

    def __init__(self, inner: Publisher) -> None:
        self.inner = inner
        self.attempts: list[tuple[Message, ...]] = []

    async def append(self, *messages: Message, deadline_s: float = 30.0) -> None:
        self.attempts.append(messages)
        if len(self.attempts) < 3:
            raise LogUnavailable("not acknowledged; it may still be written")
        await self.inner.append(*messages, deadline_s=deadline_s)


async def _post(w: World, handle: SessionHandle, *, stream: bool = False, retry: int = 0, **more: Any) -> bytes:
    body = {"model": "m", "messages": [user("go")], "stream": stream, **more}
    headers = {"Authorization": f"Bearer {handle.key}", "x-stainless-retry-count": str(retry)}
    url = f"{w.server.data_url}{handle.path}/v1/chat/completions"
    async with w.http.post(url, json=body, headers=headers) as answer:
        raw = await answer.read()
        assert answer.status == 200, raw
        return raw


async def _leave(w: World, handle: SessionHandle, *, stream: bool) -> None:
    """Ask, wait until the engine runs it, and close the connection."""
    async with anyio.create_task_group() as group:
        group.start_soon(lambda: _post(w, handle, stream=stream))
        await until(lambda: w.engines[0].in_flight == 1)
        group.cancel_scope.cancel()


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_away_aborts_its_call_and_the_part_is_recorded(stream: bool) -> None:
    async with world(saying("ls -la " * 100), token_s=0.005, limits=QUICK) as w:
        handle = await w.session()
        await _leave(w, handle, stream=stream)
        await until(lambda: w.engines[0].in_flight == 0)
        turns = await w.control.close(handle.session_id)
        assert [(turn.finish_reason, turn.trainable) for turn in turns] == [("abort", False)]
        sampled = paths(turns)[turns[0].turn_id][1]
        assert sampled == by_bytes("ls -la " * 100)[: len(sampled)] and 0 < len(sampled) < 600
        assert len(w.engines[0].aborted) == 1 and await w.published() == turns


async def test_a_retry_after_a_lost_connection_joins_the_call() -> None:
    async with world(saying("ls -la"), token_s=0.02, limits=Limits(disconnect_grace_s=5.0)) as w:
        handle = await w.session()
        await _leave(w, handle, stream=False)
        assert b"ls -la" in await _post(w, handle)
        turns = await w.control.close(handle.session_id)
        assert len(turns) == 1 and len(w.engines[0].requests) == 1 and turns[0].trainable


async def test_marked_retries_get_the_same_turn_and_unmarked_repeats_a_new_one() -> None:
    async with world(saying("ls")) as w:
        handle = await w.session()
        first, again = json.loads(await _post(w, handle)), json.loads(await _post(w, handle, retry=1))
        assert (first["id"], first["choices"]) == (again["id"], again["choices"])
        assert len(w.engines[0].requests) == 1
        await _post(w, handle)
        turns = await w.control.close(handle.session_id)
        assert len(turns) == 2 and len(w.engines[0].requests) == 2


async def test_a_retry_joins_a_call_that_waits_for_the_log_however_late_it_comes(left: list[Call]) -> None:
    gates = Gates()
    async with world(saying("ls"), limits=Limits(disconnect_grace_s=0.0), wrap=gates) as w:
        handle = await w.session()
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: _post(w, handle))
            await until(lambda: gates[0].waiting == 1)
            group.cancel_scope.cancel()
        await until(lambda: len(left) == 1)
        gates[0].open.set()
        assert b"ls" in await _post(w, handle, retry=1)
        turns = await w.control.close(handle.session_id)
        assert [turn.trainable for turn in turns] == [True]


async def test_a_marked_retry_joins_the_call_that_broke_and_not_its_twin(left: list[Call]) -> None:
    said = iter(("first " * 20, "second " * 20))
    async with world(lambda _: by_bytes(next(said)), token_s=0.01, limits=Limits(disconnect_grace_s=20.0)) as w:
        handle = await w.session()
        answers: dict[str, bytes] = {}

        async def ask(name: str, retry: int = 0) -> None:
            answers[name] = await _post(w, handle, retry=retry)

        async with anyio.create_task_group() as group:
            async with anyio.create_task_group() as broken:
                broken.start_soon(ask, "broken")
                await until(lambda: w.engines[0].in_flight == 1)
                group.start_soon(ask, "twin")
                await until(lambda: w.engines[0].in_flight == 2)
                broken.cancel_scope.cancel()
            await until(lambda: len(left) == 1)
            group.start_soon(ask, "retry", 1)
        assert b"first" in answers["retry"] and b"second" in answers["twin"]
        turns = await w.control.close(handle.session_id)
        assert [turn.trainable for turn in turns] == [True, True] and len(w.engines[0].requests) == 2


@pytest.mark.parametrize("stream", [True, False])
async def test_an_engine_killed_in_mid_turn_is_replaced_unseen(stream: bool) -> None:
    async with world(going_on("ls -la and so on"), engines=2, token_s=0.02) as w:
        handle = await w.session()
        answers: list[bytes] = []

        async def agent() -> None:
            answers.append(await _post(w, handle, stream=stream))

        async with anyio.create_task_group() as group:
            group.start_soon(agent)
            await until(lambda: any(engine.in_flight for engine in w.engines))
            busy = next(engine for engine in w.engines if engine.in_flight)
            await until(lambda: max(busy.progress(), default=0) > 3)
            await busy.close()
        assert len(answers) == 1 and (stream or b'"ls -la and so on"' in answers[0])
        (turn,) = await w.control.close(handle.session_id)
        assert list(paths([turn]).values())[0][1] == by_bytes("ls -la and so on")
        assert turn.finish_reason == "stop" and turn.engine != busy.url
        # A stream that broke did not say which weights its last tokens came from: recorded, not trained.
        assert [span.version for span in turn.spans] == (["", "scripted.0"] if stream else ["scripted.0"])
        assert turn.trainable is not stream


_FROZEN = """
import asyncio, os, signal
from kat_stream.engines.scripted import start_scripted_engine
from tests.contract.gateway_kit import going_on

async def serve():
    engine = await start_scripted_engine(going_on("ls -la and so on"), token_s=0.01)
    print(engine.url, flush=True)
    while max(engine.progress(), default=0) < 4:
        await asyncio.sleep(0.001)
    os.kill(os.getpid(), signal.SIGSTOP)

asyncio.run(serve())
"""


@asynccontextmanager
async def _freezing_engine() -> AsyncIterator[str]:
    """The address of an engine, a process of its own, that freezes in the middle of its first call."""
    process = await anyio.open_process([sys.executable, "-c", _FROZEN], stderr=None)
    try:
        assert process.stdout is not None
        yield (await process.stdout.receive()).decode().strip()
    finally:
        process.kill()
        await process.wait()


@pytest.mark.parametrize("stream", [True, False])
async def test_a_call_on_an_engine_that_froze_in_mid_turn_goes_on_at_another(
    stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router, "POLL_DEADLINE_S", 0.2)
    async with world(going_on("ls -la and so on")) as w, _freezing_engine() as url:
        handle, (well,) = await w.session(), w.engines
        w.router.remove(well.url)
        w.router.add(url)
        answers: list[bytes] = []

        async def agent() -> None:
            answers.append(await _post(w, handle, stream=stream))

        async with anyio.create_task_group() as group:
            group.start_soon(agent)
            await until(lambda: any(state.underway for state in w.router.list()))
            w.router.add(well.url)
        (turn,) = await w.control.close(handle.session_id)
        assert (turn.finish_reason, turn.engine) == ("stop", well.url) and len(answers) == 1
        assert list(paths([turn]).values())[0][1] == by_bytes("ls -la and so on")
        assert [span.version for span in turn.spans] == (["", "scripted.0"] if stream else ["scripted.0"])


async def test_an_abort_by_a_weight_update_is_resumed() -> None:
    async with world(going_on("ls -la and so on"), token_s=0.01) as w:
        handle = await w.session()
        engine, plan = w.engines[0], by_bytes("ls -la and so on")
        answers: list[bytes] = []

        async def agent() -> None:
            answers.append(await _post(w, handle))

        async with anyio.create_task_group() as group:
            group.start_soon(agent)
            await until(lambda: max(engine.progress(), default=0) > 3)
            client = w.router.list()[0].engine
            await client.pause("abort")
            engine.version = "scripted.1"
            await until(lambda: len(engine.requests) == 2)
            await client.resume()
        (turn,) = await w.control.close(handle.session_id)
        assert b'"ls -la and so on"' in answers[0]
        assert list(paths([turn]).values())[0][1] == plan and turn.trainable
        assert [span.version for span in turn.spans] == ["scripted.0", "scripted.1"]
        assert engine.requests[1].input_ids == [*engine.requests[0].input_ids, *plan[: turn.spans[0].end]]
        assert engine.requests[1].sampling_params.max_new_tokens == 4096 - turn.spans[0].end


class _Stopping(EngineClient):
    """An engine that is aborted at a place, and looks for stop strings in what one request sampled, as SGLang does."""

    plan = by_bytes("Thought: x ßEND and much more")
    cut = 0

    def sample(self, prompt: list[int], stops: tuple[str, ...]) -> Generation:
        known = next(n for n in range(len(self.plan), -1, -1) if prompt[len(prompt) - n :] == self.plan[:n])
        ids: list[int] = []
        why: Literal["stop", "abort"] = "stop"
        matched = None
        for token in self.plan[known:]:
            ids.append(token)
            text = tokenizer().decode(ids, clean_up_tokenization_spaces=False)
            matched = next((stop for stop in stops if stop in text), None)
            if matched is None and known + len(ids) == self.cut:
                why = "abort"
            if matched is not None or why == "abort":
                break
        return Generation(
            output_ids=ids, logprobs=[-1.0] * len(ids), finish_reason=why, matched=matched, cached_tokens=0,
            prompt_tokens=len(prompt), spans=[Span("v", 0, len(ids))] if ids else [], seconds=0.0,
        )  # fmt: skip

    async def generate(self, ids: Any, sampling: SamplingParams, **_: Any) -> Generation:
        return self.sample(json.loads(bytes(ids)), sampling.stop)

    async def generate_stream(self, ids: Any, sampling: SamplingParams, **_: Any) -> AsyncIterator[Increment]:
        whole = self.sample(json.loads(bytes(ids)), sampling.stop)
        yield Increment(output_ids=whole.output_ids, logprobs=whole.logprobs)
        yield Increment(output_ids=[], logprobs=[], final=whole)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_stop_string_that_an_abort_cut_in_two_ends_the_reply(stream: bool) -> None:
    async with world(saying("unused")) as w:
        state = w.router.list()[0]
        state.engine = engine = _Stopping(state.url, w.http)
        whole = by_bytes("Thought: x ßEN", end=False)
        for cut in range(1, len(engine.plan)):
            handle, engine.cut = await w.session(), cut
            answer = await _post(w, handle, stream=stream, stop=["never", "ßEN"])
            (turn,) = await w.control.close(handle.session_id)
            assert list(paths([turn]).values())[0][1] == whole, cut
            assert (turn.content, turn.finish_reason, turn.matched_stop) == ("Thought: x ", "stop", "ßEN")
            assert turn.trainable and "ß".encode() not in answer and b"END" not in answer


async def test_a_paused_engine_makes_the_agent_wait_with_signs_of_life() -> None:
    async with world(saying("ls"), limits=QUICK) as w:
        handle = await w.session()
        client = w.router.list()[0].engine
        await client.pause("retract")
        answers: list[bytes] = []

        async def agent() -> None:
            answers.append(await _post(w, handle, stream=True))

        async with anyio.create_task_group() as group:
            group.start_soon(agent)
            await until(lambda: w.engines[0].in_flight == 1)
            assert not await _done_within(answers, 0.2)
            await client.resume()
        assert answers[0].count(b": keepalive") >= 2 and answers[0].endswith(b"data: [DONE]\n\n")


async def _done_within(answers: list[bytes], seconds: float) -> bool:
    with anyio.move_on_after(seconds):
        await until(lambda: bool(answers), deadline_s=seconds * 2)
    return bool(answers)


async def test_no_reply_without_a_record() -> None:
    async with world(saying("ls"), limits=QUICK, wrap=lambda _log: Away()) as w:
        handle = await w.session()
        with pytest.raises(openai.InternalServerError) as refused:
            await w.client(handle).chat.completions.create(model="m", messages=[user("go")])
        assert refused.value.status_code == 503 and "ls" not in str(refused.value.body)
        assert await w.control.close(handle.session_id) == []


async def test_a_record_that_is_tried_again_is_the_same_message() -> None:
    """A producer that has it on its way then adds no second copy."""
    unheard: list[Unheard] = []

    def wrap(log: Publisher) -> Publisher:
        unheard.append(Unheard(log))
        return unheard[0]

    async with world(saying("ls"), wrap=wrap) as w:
        handle = await w.session()
        await _post(w, handle)
        assert len(unheard[0].attempts) == 3
        assert len({_digest(message) for (message,) in unheard[0].attempts}) == 1
        assert len(await w.published()) == 1


async def test_no_engine_is_a_503_in_time() -> None:
    async with world(saying("ls"), limits=Limits(call_s=0.3)) as w:
        handle = await w.session()
        await w.engines[0].close()
        with pytest.raises(openai.InternalServerError) as refused:
            await w.client(handle).chat.completions.create(model="m", messages=[user("go")])
        assert refused.value.status_code == 503


async def test_closing_a_session_ends_its_calls() -> None:
    async with world(saying("ls -la " * 100), token_s=0.005) as w:
        handle = await w.session()
        refused: list[int] = []

        async def agent() -> None:
            with pytest.raises(openai.APIStatusError) as error:
                await w.client(handle).chat.completions.create(model="m", messages=[user("go")])
            refused.append(error.value.status_code)

        async with anyio.create_task_group() as group:
            group.start_soon(agent)
            await until(lambda: w.engines[0].in_flight == 1)
            turns = await w.control.close(handle.session_id, deadline_s=5.0)
        assert refused == [409]
        assert [turn.finish_reason for turn in turns] == ["abort"] and w.engines[0].in_flight == 0
        assert await w.control.close(handle.session_id) == turns
