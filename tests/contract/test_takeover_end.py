"""An end outlives the gateway that saw it, a move that takes long leaves one owner, and a worker has all its turns."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import anyio
import msgspec
import pytest

from kat_stream.errors import GatewayError, LogUnavailable
from kat_stream.gateway import takeover
from kat_stream.gateway.app import GatewayControl, SessionHandle
from kat_stream.gateway.limits import Limits
from kat_stream.gateway.peers import STALL_S, Peers
from kat_stream.gateway.takeover import CLAIM, END, Takeover
from kat_stream.log import Message
from tests.contract.gateway_kit import saying, user
from tests.contract.log_records import everything
from tests.contract.takeover_kit import Gateways, gateways
from tests.waiting import until
from topics import Sampling, Turn
from topics.record import decode

pytestmark = pytest.mark.anyio


async def _refused_as_ended(them: Gateways, number: int, handle: SessionHandle) -> None:
    for said in ("go", "and?", "go"):
        status, body = await them.post(number, handle, {"messages": [user(said)]})
        assert (status, body["error"]["code"]) == (409, "session_ended")


def _takeover(them: Gateways, number: int) -> Takeover:
    own = them.servers[number]._takeover
    assert own is not None
    return own


@asynccontextmanager
async def _held(
    them: Gateways, which: Callable[[Turn], bool], *, landed: bool = False
) -> AsyncIterator[tuple[list[Turn], anyio.Event]]:
    """Records that wait before the log, or for its word, until the event is set or this is left."""
    append, waiting, go_on = them.log.append, list[Turn](), anyio.Event()

    async def held(*messages: Message, deadline_s: float = 30.0) -> None:
        turn = decode(Turn, messages[0].value)
        if held_back := which(turn) and not go_on.is_set():
            waiting.append(turn)
        if held_back and not landed:
            await go_on.wait()
        await append(*messages, deadline_s=deadline_s)
        if held_back and landed:
            await go_on.wait()

    them.log.append = held  # type: ignore[method-assign]
    try:
        yield waiting, go_on
    finally:
        go_on.set()


@pytest.mark.parametrize("calls", [0, 2])
async def test_what_ended_is_refused_by_a_gateway_that_knows_only_the_log(calls: int) -> None:
    async with gateways(saying("one", "two")) as them:
        handle = await them.open()
        await them.talk(handle, [0] * calls)
        turns = await them.control(0).close(handle.session_id)
        await them.servers[0].close()
        await _refused_as_ended(them, 1, handle)
        assert [turn.side for turn in await them.turns()] == [*[""] * calls, END, CLAIM]
        assert await them.close_at(1, handle) == turns
        await _refused_as_ended(them, 1, handle)
        assert len(them.engine.requests) == calls and await them.control(1).sessions() == []


async def test_what_nobody_used_for_long_has_ended_for_every_gateway() -> None:
    async with gateways(saying("one"), limits=Limits(idle_s=0.05)) as them:
        handle = await them.open()

        async def ended() -> bool:
            return [turn.side for turn in await them.turns()] == [END]

        await until(ended, "the end of the session")
        await them.servers[0].close()
        await _refused_as_ended(them, 1, handle)


async def test_the_end_that_a_replaced_gateway_says_ends_nothing() -> None:
    async with gateways(saying("one", "two", "three"), number=3) as them:
        handle = await them.open()
        messages = await them.talk(handle, [0, 1])
        first, *_ = await them.turns()
        await them.log.publish(msgspec.structs.replace(first, turn_id="late", side=END))
        await them.servers[1].close()
        assert (await them.say(2, handle, messages))["content"] == "three"


async def test_a_worker_closes_again_at_another_gateway_while_the_first_lives() -> None:
    async with gateways(saying("one", "two")) as them:
        handle = await them.open()
        await them.talk(handle, [0, 0])
        turns = await them.close_at(0, handle)
        assert len(turns) == 2 and await them.close_at(1, handle) == turns
        for number in range(2):
            await _refused_as_ended(them, number, handle)


async def test_a_worker_closes_a_session_that_is_just_moving() -> None:
    async with gateways(saying("x" * 400), token_s=0.01) as them, anyio.create_task_group() as group:
        handle, turns, statuses = await them.open(), list[Turn](), list[int]()

        async def ask(number: int) -> None:
            statuses.append((await them.post(number, handle, {"messages": [user(f"at {number}")]}))[0])

        async def close() -> None:
            turns.extend(await them.close_at(0, handle))

        async with _held(them, lambda turn: not turn.side) as (waiting, go_on):
            group.start_soon(ask, 0)
            await until(lambda: them.engine.in_flight == 1)
            session = _takeover(them, 0)._sessions.find(handle.session_id)
            group.start_soon(ask, 1)
            await until(lambda: bool(waiting) and session.moved)
            group.start_soon(close)
            await until(lambda: not session.moved)
            go_on.set()
            await until(lambda: len(statuses) == 2 and bool(turns))
        assert statuses == [409, 409] and [turn.finish_reason for turn in turns] == ["abort"]
        sides = [turn.side for turn in await them.turns()]
        assert sides[:2] == ["", END] and sides[-1] == CLAIM


async def test_a_gateway_that_takes_long_to_take_a_session_leaves_it_to_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its claim is older than the next one's: what it would answer would not count."""
    async with gateways(saying("one", "two"), number=3) as them, anyio.create_task_group() as group:
        handle = await them.open()
        messages = await them.talk(handle, [0])
        await them.servers[0].close()
        statuses: list[int] = []

        async def slowly() -> None:
            statuses.append((await them.post(1, handle, {"messages": messages}))[0])

        readers = _takeover(them, 1)._readers
        for _ in range(readers._value):
            await readers.acquire()
        group.start_soon(slowly)

        async def claimed() -> bool:
            return (await them.turns())[-1].side == CLAIM

        await until(claimed)
        monkeypatch.setattr(takeover, "STAND_BACK_S", 0.1)
        with anyio.fail_after(1.0):  # sooner than a peer is given up
            assert (await them.say(2, handle, messages))["content"] == "two"
        readers.release()
        await until(lambda: statuses == [503])
        assert [turn.content for turn in await them.close_at(2, handle)] == ["one", "two"]


async def test_a_gateway_that_stood_still_while_it_took_a_session_leaves_it() -> None:
    async with gateways(saying("one", "two")) as them, anyio.create_task_group() as group:
        handle = await them.open()
        messages = await them.talk(handle, [0])
        statuses: list[int] = []

        async def ask() -> None:
            statuses.append((await them.post(1, handle, {"messages": messages}))[0])

        async with _held(them, lambda turn: turn.side == CLAIM) as (waiting, _):
            group.start_soon(ask)
            await until(lambda: bool(waiting))
            _takeover(them, 1).forget()
        await until(lambda: statuses == [503])
        assert (await them.say(1, handle, messages))["content"] == "two"


async def test_a_gateway_that_stood_still_while_it_asked_for_a_session_claims_none() -> None:
    async with gateways(saying("one", "two", "three"), token_s=0.01) as them, anyio.create_task_group() as group:
        handle = await them.open()
        messages = await them.talk(handle, [0])
        statuses: list[int] = []

        async def ask(number: int) -> None:
            statuses.append((await them.post(number, handle, {"messages": messages}))[0])

        async with _held(them, lambda turn: turn.index == 1) as (waiting, _):
            group.start_soon(ask, 0)
            await until(lambda: bool(waiting))
            group.start_soon(ask, 1)  # waits until the call at the other one is recorded
            await until(lambda: handle.session_id in _takeover(them, 1)._taking)
            _takeover(them, 1).forget()
        await until(lambda: sorted(statuses) == [200, 503])
        assert CLAIM not in [turn.side for turn in await them.turns()]


async def test_a_worker_closes_at_a_gateway_that_stood_still_and_has_what_was_said_elsewhere() -> None:
    async with gateways(saying("one", "two")) as them:
        handle = await them.open()
        messages = await them.talk(handle, [0])
        _takeover(them, 1)._peers = Peers()  # the other one answers nobody
        await them.say(1, handle, messages)
        them.servers[0]._calls.pulse._beaten -= STALL_S + 1
        assert [turn.content for turn in await them.close_at(0, handle)] == ["one", "two"]


async def test_a_full_gateway_takes_no_session_from_one_that_serves_it() -> None:
    async with gateways(saying("one", "two"), limits=Limits(sessions=1)) as them:
        handle = await them.open()
        messages = await them.talk(handle, [0])
        await them.control(1).open(run="r1", group_id="g1", rollout_id="r", sampling=Sampling())
        status, body = await them.post(1, handle, {"messages": messages})
        assert (status, body["error"]["code"]) == (503, "too_many_sessions")
        assert (await them.say(0, handle, messages))["content"] == "two"
        assert CLAIM not in [turn.side for turn in await them.turns()]


async def test_a_session_whose_beginning_is_not_kept_any_more_is_not_claimed_again_and_again() -> None:
    async with gateways(saying("one", "two")) as them:
        handle = await them.open()
        messages = await them.talk(handle, [0])
        await them.servers[0].close()
        for partition in them.log._topics["turns"]:
            partition.trim(0, 0, partition.end)
        for _ in range(3):
            status, body = await them.post(1, handle, {"messages": messages})
            assert status == 503 and "LogError" in body["error"]["message"]
        assert await them.turns() == []


async def test_a_log_that_is_away_at_the_end_costs_no_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateways(saying("one")) as them:
        handle = await them.open()
        await them.say(0, handle, [user("go")])

        async def away(*_: Message, deadline_s: float = 30.0) -> None:
            raise LogUnavailable("the broker is away")

        monkeypatch.setattr(them.log, "append", away)
        monkeypatch.setattr(takeover, "END_S", 0.1)
        assert [turn.content for turn in await them.close_at(0, handle)] == ["one"]
        await _refused_as_ended(them, 0, handle)


async def test_a_worker_whose_gateway_is_full_opens_at_the_next() -> None:
    async with gateways(saying("one"), limits=Limits(sessions=1)) as them:
        first, second = (server.control_url for server in them.servers)
        control = GatewayControl(first, them.http, (second,))
        for number in range(2):
            await control.open(run="r1", group_id="g1", rollout_id=f"r{number}", sampling=Sampling())
        with pytest.raises(GatewayError, match="503"):
            await control.open(run="r1", group_id="g1", rollout_id="r2", sampling=Sampling())
        assert [len(await them.control(number).sessions()) for number in range(2)] == [1, 1]


async def test_a_worker_that_closes_while_gateways_ask_each_other_asks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateways(saying("one")) as them:
        handle = await them.open()
        await them.say(0, handle, [user("go")])
        first, second = (server.control_url for server in them.servers)
        control = GatewayControl(second, them.http, (first,), patience_s=10.0)
        control._keys[handle.session_id] = handle.key
        check, times = Takeover._check, [0]

        def disturbed(own: Takeover, move: Any) -> None:
            times[0] += 1
            move.disturbed = move.disturbed or times[0] == 1
            check(own, move)

        monkeypatch.setattr(Takeover, "_check", disturbed)
        assert [turn.content for turn in await control.close(handle.session_id)] == ["one"]


def _is_call(turn: Turn) -> bool:
    return turn.index == 1


def _is_end(turn: Turn) -> bool:
    return turn.side == END


def _is_claim(turn: Turn) -> bool:
    return turn.side == CLAIM


@pytest.mark.parametrize("landed", [False, True], ids=["before the log", "behind the log"])
@pytest.mark.parametrize("record", [_is_call, _is_end, _is_claim])
async def test_a_gateway_killed_at_any_record_loses_and_doubles_nothing(
    record: Callable[[Turn], bool], landed: bool
) -> None:
    async with gateways(saying("one", "two"), number=3) as them, anyio.create_task_group() as group:
        handle = await them.open()
        messages = await them.talk(handle, [0])
        victim = 1 if record is _is_claim else 0
        if victim:
            await them.servers[0].close()

        async def asks() -> None:
            with contextlib.suppress(aiohttp.ClientError):
                if record is _is_end:
                    await them.close_at(victim, handle)
                else:
                    await them.post(victim, handle, {"messages": messages})

        async with _held(them, record, landed=landed) as (waiting, _):
            group.start_soon(asks)
            await until(lambda: bool(waiting))
            await them.servers[victim].close()
        if record is not _is_end:
            assert (await them.say(victim + 1, handle, messages))["content"] == "two"
        turns = await them.close_at(victim + 1, handle)
        said = ["one"] if record is _is_end else ["one", "two"]
        assert [turn.content for turn in turns] == said and [turn.index for turn in turns] == list(range(len(said)))
        await _refused_as_ended(them, 2, handle)
        assert await them.close_at(2, handle) == turns


async def test_the_key_of_a_session_that_moves_and_ends_stands_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    async with gateways(saying("one", "two")) as them:
        handle = await them.open()
        await them.talk(handle, [0, 1])
        _, signature = handle.key.split(".")  # the rest says what the records say
        told = [delivered.value.decode(errors="replace") for delivered in await everything(them.log, "turns")]
        for path in ("metrics", "sessions", "health"):
            async with them.http.get(f"{them.servers[1].control_url}/{path}") as answer:
                told.append(await answer.text())
        await them.close_at(0, handle)
        await _refused_as_ended(them, 1, handle)
        assert not [text for text in [*told, caplog.text] if signature in text]
