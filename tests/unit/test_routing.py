"""The router over scripted engines: sticky, least loaded, random ties, back-off, silence, waiting with a deadline."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from contextlib import AsyncExitStack

import anyio
import pytest
from aiohttp import web

from kat_stream.engines.client import EngineClient, Load, SamplingParams
from kat_stream.engines.scripted import ScriptedEngine, start_scripted_engine
from kat_stream.errors import DeadlineExceeded, EngineUnavailable
from kat_stream.routing import EngineState, Router, StickyLeastLoaded, router
from kat_stream.routing.engine_state import SILENT_POLLS
from tests.waiting import until

pytestmark = pytest.mark.anyio


def _state(load: int = 0) -> EngineState:
    return EngineState(EngineClient("http://127.0.0.1:1", None), in_flight=load)  # type: ignore[arg-type]


async def test_a_session_stays_and_others_go_to_the_least_loaded() -> None:
    policy, engines = StickyLeastLoaded(), [_state(5), _state(3), _state(9)]
    assert policy.choose("a", 1, engines) is engines[1]
    engines[1].in_flight = 100
    assert policy.choose("a", 1, engines) is engines[1]
    assert policy.choose("b", 1, engines) is engines[0]
    assert policy.choose("a", 1, [engines[0], engines[2]]) is engines[0]
    policy.forget("a")
    engines[2].in_flight = 0
    assert policy.choose("a", 1, engines) is engines[2]


async def test_ties_are_broken_at_random() -> None:
    engines = [_state() for _ in range(4)]
    chosen = Counter(id(StickyLeastLoaded().choose("s", 1, engines)) for _ in range(400))
    assert len(chosen) == 4 and min(chosen.values()) > 50


async def test_own_calls_count_at_once_and_not_twice() -> None:
    state = _state(100)
    state.polled([Load(num_used_tokens=130, num_waiting_uncached_tokens=20)])
    assert state.load == 150
    state.in_flight += 40
    assert state.load == 190
    state.in_flight = 0
    assert state.load == 50


async def test_back_off_doubles_and_ends_with_an_answer() -> None:
    state = _state()
    waits = []
    for _ in range(8):
        state.failed(10.0)
        waits.append(state.retry_at - 10.0)
    assert waits[:4] == [0.25, 0.5, 1.0, 2.0] and waits[-1] == 8.0
    assert not state.available(10.1) and state.available(18.0)
    state.answered()
    assert state.available(0.0)


async def _fleet(stack: AsyncExitStack, count: int) -> list[ScriptedEngine]:
    engines = [await start_scripted_engine(lambda ids: [1, 2, 3]) for _ in range(count)]
    for engine in engines:
        stack.push_async_callback(engine.close)
    return engines


async def test_a_lease_is_credited_and_given_back() -> None:
    async with AsyncExitStack() as stack:
        engines = await _fleet(stack, 2)
        async with Router([engine.url for engine in engines]) as router:
            async with router.lease("a", 70, deadline_s=1) as first, router.lease("b", 50, deadline_s=1) as second:
                assert first is not second and (first.in_flight, second.in_flight) == (70, 50)
                async with router.lease("c", 10, deadline_s=1) as third:
                    assert third is second
            assert [state.in_flight for state in router.list()] == [0, 0]


async def test_an_engine_that_refuses_is_skipped_and_comes_back() -> None:
    async with AsyncExitStack() as stack:
        engines = await _fleet(stack, 2)
        async with Router([engine.url for engine in engines], poll_s=60) as router:
            async with router.lease("s", 1, deadline_s=1) as home:
                assert home.available(time.monotonic())
            dead = next(engine for engine in engines if engine.url == home.url)
            await dead.close()
            with pytest.raises(EngineUnavailable):
                async with router.lease("s", 1, deadline_s=1) as state:
                    await state.engine.generate([1], SamplingParams(), rid="x1", deadline_s=5)
            async with router.lease("s", 1, deadline_s=1) as state:
                assert state.url != dead.url
                assert (await state.engine.generate([1], SamplingParams(), rid="x2", deadline_s=5)).output_ids == [
                    1,
                    2,
                    3,
                ]
            assert all(state.in_flight == 0 for state in router.list())


async def _silent_until(stack: AsyncExitStack, awake: asyncio.Event, says: str = "") -> str:
    """An engine that takes connections and answers nothing before `awake`, like a frozen process, but at `says`."""

    async def answer(request: web.Request) -> web.Response:
        if request.path == says:
            return web.json_response({"model_path": "m", "weight_version": "v"})
        await awake.wait()
        return web.json_response({"loads": []})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.0)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    return site.name


async def test_an_engine_that_says_nothing_is_left_until_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router, "POLL_DEADLINE_S", 0.05)
    async with AsyncExitStack() as stack:
        awake = asyncio.Event()
        url = await _silent_until(stack, awake)
        async with Router([url], poll_s=0.01) as fleet:
            (state,) = fleet.list()
            await until(lambda: state.silent_polls > 0)
            assert state.available(time.monotonic()), "one poll without an answer says nothing: it may be busy"
            await until(lambda: not state.available(time.monotonic() + 3600))
            with pytest.raises(EngineUnavailable, match="none of 1 engines"):
                async with fleet.lease("s", 1, deadline_s=0.1):
                    pass
            awake.set()
            async with fleet.lease("s", 1, deadline_s=10) as leased:
                assert leased is state


async def test_a_call_does_not_wait_for_an_engine_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router, "POLL_DEADLINE_S", 0.05)
    async with AsyncExitStack() as stack:
        frozen = await _silent_until(stack, asyncio.Event())
        nobody = "http://127.0.0.1:1"  # as where a host went away: calls hang, new connections are refused
        for url in (frozen, nobody):
            async with Router([url], poll_s=0.01) as fleet:
                with pytest.raises(EngineUnavailable, match="answers nobody"), anyio.fail_after(10):
                    async with fleet.lease("s", 1, deadline_s=1) as state:
                        await anyio.sleep_forever()
                assert state.in_flight == 0 and not state.underway


async def test_a_call_goes_on_where_an_engine_cannot_tell_its_load_but_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """As while it loads weights."""
    monkeypatch.setattr(router, "POLL_DEADLINE_S", 0.05)
    async with AsyncExitStack() as stack:
        url = await _silent_until(stack, asyncio.Event(), says="/model_info")
        async with Router([url], poll_s=0.01) as fleet, fleet.lease("s", 1, deadline_s=1) as state:
            await until(lambda: state.silent_polls > SILENT_POLLS)
            assert len(state.underway) == 1


async def test_a_call_that_ran_out_of_time_counts_against_a_silent_engine_only() -> None:
    async with AsyncExitStack() as stack:
        (well,) = await _fleet(stack, 1)
        for url, poll_s in ((well.url, 0.01), (await _silent_until(stack, asyncio.Event()), 60)):
            async with Router([url], poll_s=poll_s) as fleet:
                with pytest.raises(DeadlineExceeded):
                    async with fleet.lease("s", 1, deadline_s=1) as state:
                        if url == well.url:
                            answers = state.answers
                            await until(lambda state=state, answers=answers: state.answers > answers)  # type: ignore[misc]
                        raise DeadlineExceeded("the answer", 1)
                assert (state.failures == 0) == (url == well.url)


async def test_engines_are_added_and_removed_while_it_runs() -> None:
    async with AsyncExitStack() as stack:
        (engine,) = await _fleet(stack, 1)
        async with Router([]) as router:
            with pytest.raises(EngineUnavailable, match="none of 0 engines"), anyio.fail_after(5):
                async with router.lease("s", 1, deadline_s=0.1):
                    pass
            router.add(engine.url + "/")
            router.add(engine.url)
            async with router.lease("s", 1, deadline_s=1) as state:
                assert state.url == engine.url
            router.remove(engine.url)
            assert router.list() == ()


async def test_a_poller_that_dies_is_raised_where_the_router_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EngineState, "polled", lambda self, load: 1 / 0)
    async with AsyncExitStack() as stack:
        (engine,) = await _fleet(stack, 1)
        with pytest.raises(ExceptionGroup) as caught, anyio.fail_after(60):
            async with Router([engine.url]):
                await anyio.sleep_forever()
        assert caught.group_contains(ZeroDivisionError)


async def test_an_error_of_the_user_leaves_the_router_as_it_is() -> None:
    with pytest.raises(ZeroDivisionError):
        async with Router([]):
            raise ZeroDivisionError
