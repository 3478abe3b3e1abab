"""A session moves between gateways: rebuilt from `turns`, with unbroken lineage, and the gateway it left is fenced."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kat_stream.config import GatewaySection
from kat_stream.engines.scripted import ScriptedEngine, ScriptedPolicy, start_scripted_engine
from kat_stream.errors import GatewayError
from kat_stream.gateway.app import GatewayControl, GatewayServer, Moving, SessionHandle, start_gateway
from kat_stream.gateway.limits import Limits
from kat_stream.gateway.peers import Peers, Pulse
from kat_stream.gateway.takeover import CLAIM, READ_S, Lineage
from kat_stream.gateway.tickets import Mint, Ticket, run_secret
from kat_stream.log import Message
from kat_stream.log.memory import MemoryLog
from kat_stream.log.message import seal
from kat_stream.routing import Router
from tests.contract.gateway_kit import CHATML, OWN_IDS, by_bytes, paths, saying, tokenizer, until, user
from topics import Sampling, Turn, topic_named
from topics.record import decode

pytestmark = pytest.mark.anyio
SECRET = b"s" * 32
QUICK = Limits(keepalive_s=0.05, disconnect_grace_s=0.05)


class Later:
    """A peer whose address is known once it has started."""

    def __init__(self) -> None:
        self.control: GatewayControl | None = None

    async def release(self, session_id: str, *, deadline_s: float) -> str:
        if self.control is None:
            raise GatewayError("not there")
        return await self.control.release(session_id, deadline_s=deadline_s)


@dataclass
class Gateways:
    """Several gateways over one log and one engine."""

    log: MemoryLog
    engine: ScriptedEngine
    http: aiohttp.ClientSession
    servers: list[GatewayServer] = field(default_factory=list)

    def control(self, number: int) -> GatewayControl:
        return GatewayControl(self.servers[number].control_url, self.http)

    async def open(self, rollout: str = "r1g1s0") -> SessionHandle:
        return await self.control(0).open(run="r1", group_id="g1", rollout_id=rollout, sampling=Sampling())

    async def post(self, number: int, handle: SessionHandle, body: dict[str, Any], **headers: str) -> tuple[int, Any]:
        url = f"{self.servers[number].data_url}{handle.path}/v1/chat/completions"
        known = {"Authorization": f"Bearer {handle.key}", **headers}
        async with self.http.post(url, json={"model": "m", **body}, headers=known) as answer:
            return answer.status, await answer.json(content_type=None)

    async def say(self, number: int, handle: SessionHandle, messages: list[Any], **more: Any) -> dict[str, Any]:
        status, body = await self.post(number, handle, {"messages": messages, **more})
        assert status == 200, body
        message: dict[str, Any] = body["choices"][0]["message"]
        return message

    async def turns(self) -> list[Turn]:
        """All that is on the log, claims included."""
        out = []
        async with self.log.follow(("turns",)) as follower:
            async for delivered in follower.catch_up():
                turn = delivered.record()
                assert isinstance(turn, Turn)
                out.append(turn)
        return out


@asynccontextmanager
async def gateways(
    policy: ScriptedPolicy,
    *,
    number: int = 2,
    token_s: float = 0.0,
    tools: str = "none",
    template: str = CHATML,
    stall_s: float = 10.0,
    limits: Limits = QUICK,
) -> AsyncIterator[Gateways]:
    """They know each other; all is closed at the end."""
    async with AsyncExitStack() as stack:
        engine = await start_scripted_engine(policy, token_s=token_s)
        stack.push_async_callback(engine.close)
        log = MemoryLog()
        await log.apply_topics([topic_named("turns")])
        router = await stack.enter_async_context(Router([engine.url], poll_s=0.05))
        http = await stack.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
        them = Gateways(log, engine, http)
        known = [Later() for _ in range(number)]
        for own in known:
            peers = Peers([peer for peer in known if peer is not own], release_s=2.0)
            server = await start_gateway(
                tokenizer=tokenizer(template),
                log=log,
                router=router,
                config=GatewaySection(tools=tools),
                model_name="policy",
                limits=limits,
                moving=Moving(log, SECRET, peers, Pulse(stall_s)),
            )
            own.control = GatewayControl(server.control_url, http)
            stack.push_async_callback(server.close)
            them.servers.append(server)
        yield them


async def _talk(them: Gateways, handle: SessionHandle, at: list[int]) -> list[dict[str, Any]]:
    """One turn at each of these gateways, in order."""
    messages: list[dict[str, Any]] = [user("go")]
    for number in at:
        said = await them.say(number, handle, messages)
        messages += [{"role": "assistant", "content": said["content"]}, user("and?")]
    return messages


@pytest.mark.parametrize("at", [[0, 0, 1], [0, 1, 0, 1], [1, 1]], ids=["moved", "back and forth", "before a turn"])
async def test_a_session_that_moves_goes_on_exactly_where_it_was(at: list[int]) -> None:
    async with gateways(saying("ls -la", "cat x", "done", "more")) as them:
        handle = await them.open()
        await _talk(them, handle, at)
        turns = await them.control(at[-1]).close(handle.session_id)
        claims = [turn for turn in await them.turns() if turn.side == CLAIM]
        assert len(claims) == sum(a != b for a, b in zip([0, *at], at, strict=False))
        assert [turn.index for turn in turns] == list(range(len(at)))
        assert [turn.parent for turn in turns] == ["", *(turn.turn_id for turn in turns[:-1])]
        assert [turn.fork for turn in turns] == [""] * len(at)
        known = paths(turns)
        assert [prompt for prompt, _ in known.values()] == [asked.input_ids for asked in them.engine.requests]
        whole = [len(known[t.parent][0]) + len(known[t.parent][1]) if t.parent else 0 for t in turns]
        assert [turn.prefix_len for turn in turns] == whole


async def test_forks_tools_and_side_requests_are_known_after_a_move() -> None:
    async def next_turn(number: int, *, moves: bool) -> Turn:
        call = '<tool_call>\n{"name": "sh", "arguments": {"cmd":   "ls"}}\n</tool_call>'
        async with gateways(saying(f"go {call}", "done"), tools="hermes") as them:
            handle = await them.open()
            tools = [{"type": "function", "function": {"name": "sh", "parameters": {"type": "object"}}}]
            said = await them.say(0, handle, [user("go")], tools=tools)
            await them.say(0, handle, [user("title?")], max_tokens=1)
            (used,) = said["tool_calls"]
            result = {"role": "tool", "tool_call_id": used["id"], "content": "x"}
            history = [
                [user("go"), said, result],
                [user("go"), {**said, "content": "edited"}, result],
                [user("start anew")],
                [user("go")],
            ][number]
            await them.say(int(moves), handle, history, tools=tools if number != 2 else [], max_tokens=50)
            return (await them.control(int(moves)).close(handle.session_id))[-1]

    for number in range(4):
        stayed, moved = [await next_turn(number, moves=moves) for moves in (False, True)]
        same = (
            "index",
            "prefix_len",
            "prompt_ids",
            "sampled_ids",
            "fork",
            "side",
            "thread",
            "conversation",
            "messages",
        )
        assert [getattr(stayed, name) for name in same] == [getattr(moved, name) for name in same]
        assert bool(stayed.parent) == bool(moved.parent) and bool(stayed.after) == bool(moved.after)


@pytest.mark.parametrize("moves", [False, True])
async def test_a_policy_sees_its_own_ids_of_calls_and_the_agent_ours(moves: bool) -> None:
    call = "<|tool_call_begin|>functions.sh:0<|tool_call_argument_begin|>{}<|tool_call_end|>"
    section = f"<|tool_calls_section_begin|>{call}<|tool_calls_section_end|>"
    async with gateways(saying(section, "done", "more"), tools="kimi", template=OWN_IDS) as them:
        handle = await them.open()
        tools = [{"type": "function", "function": {"name": "sh", "parameters": {"type": "object"}}}]
        said = await them.say(0, handle, [user("go")], tools=tools)
        (used,) = said["tool_calls"]
        assert used["id"].isalnum()
        history = [user("go"), said, {"role": "tool", "tool_call_id": used["id"], "content": "x"}]
        await them.say(int(moves), handle, history, tools=tools)
        await them.say(int(moves), handle, history)  # without tools all is rendered anew
        for asked in them.engine.requests[1:]:
            shown = tokenizer().decode(asked.input_ids)
            assert f"{call}<|tool_calls_section_end|>" in shown and "## Return of functions.sh:0\nx" in shown
            assert used["id"] not in shown
        turns = await them.control(int(moves)).close(handle.session_id)
        assert [turn.fork for turn in turns] == ["", "", "tools"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_reply_that_was_recorded_and_never_seen_is_given_to_the_retry(stream: bool) -> None:
    async with gateways(saying("ls -la", "more")) as them:
        handle = await them.open()
        await them.say(0, handle, [user("go")])
        await them.servers[0].close()
        body = {"model": "m", "messages": [user("go")], "stream": stream}
        url = f"{them.servers[1].data_url}{handle.path}/v1/chat/completions"
        async with them.http.post(url, json=body, headers={"Authorization": f"Bearer {handle.key}"}) as answer:
            assert answer.status == 200 and b"ls -la" in await answer.read()
        assert len(them.engine.requests) == 1
        assert len(await them.control(1).close(handle.session_id)) == 1


async def test_what_a_living_gateway_was_doing_is_recorded_as_aborted_before_the_session_moves() -> None:
    async with gateways(saying("x" * 400), token_s=0.01) as them:
        handle = await them.open()
        answers: list[tuple[int, Any]] = []

        async def ask() -> None:
            answers.append(await them.post(0, handle, {"messages": [user("go")]}))

        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            await until(lambda: them.engine.in_flight == 1)
            assert (await them.post(1, handle, {"messages": [user("other")], "max_tokens": 2}))[0] == 200
        assert answers[0][0] == 503 and answers[0][1]["error"]["code"] == "session_moved"
        first, claim, second = await them.turns()
        assert (first.finish_reason, claim.side, second.claim) == ("abort", CLAIM, claim.turn_id)


async def test_a_turn_that_a_replaced_gateway_still_writes_does_not_count() -> None:
    async with gateways(saying("one", "two", "three"), number=3) as them:
        handle = await them.open()
        await _talk(them, handle, [0, 1])
        first, *_ = turns = await them.turns()
        late = msgspec.structs.replace(first, turn_id="late", index=1, parent=first.turn_id)
        await them.log.publish(late)
        counted = await _close_at(them, 2, handle)
        assert [turn.turn_id for turn in counted] == [turns[0].turn_id, turns[2].turn_id]


async def test_a_claim_right_behind_ours_is_seen_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateways(saying("one", "two")) as them:
        handle = await them.open()
        await them.say(0, handle, [user("go")])
        append = them.log.append

        async def raced(*messages: Message, deadline_s: float = 30.0) -> None:
            """Another gateway's claim comes onto the log before anybody can read ours."""
            claim = decode(Turn, messages[0].value)
            assert claim.side == CLAIM
            monkeypatch.undo()
            other = msgspec.structs.replace(claim, turn_id="other")
            await append(*messages, seal(other), deadline_s=deadline_s)

        monkeypatch.setattr(them.log, "append", raced)
        with anyio.fail_after(READ_S / 3):
            status, body = await them.post(1, handle, {"messages": [user("go")]})
        assert (status, body["error"]["code"]) == (503, "session_moved")
        again = await them.say(1, handle, [user("go")])
        assert again["content"] == "one"  # the retry of the call that was answered


async def _close_at(them: Gateways, number: int, handle: SessionHandle) -> list[Turn]:
    """As the worker that opened it closes it, at another gateway."""
    url = f"{them.servers[number].control_url}/sessions/{handle.session_id}/close"
    async with them.http.post(url, headers={"X-Session-Key": handle.key}) as answer:
        raw = await answer.read()
        assert answer.status == 200, raw
        return msgspec.msgpack.decode(raw, type=list[Turn])


async def test_a_worker_finds_another_gateway_when_its_own_is_gone() -> None:
    async with gateways(saying("one", "two")) as them:
        first, second = (server.control_url for server in them.servers)
        control = GatewayControl(first, them.http, (second,), patience_s=5.0)
        handle = await control.open(run="r1", group_id="g1", rollout_id="r", sampling=Sampling())
        await them.say(0, handle, [user("go")])
        await them.servers[0].close()
        assert [turn.content for turn in await control.close(handle.session_id)] == ["one"]
        await control.open(run="r1", group_id="g1", rollout_id="r", sampling=Sampling())
        assert len(await them.control(1).sessions()) == 1


async def test_a_session_that_ended_at_a_living_gateway_has_ended_everywhere() -> None:
    async with gateways(saying("one")) as them:
        handle = await them.open()
        await them.say(0, handle, [user("go")])
        await them.control(0).close(handle.session_id)
        status, body = await them.post(1, handle, {"messages": [user("go")]})
        assert (status, body["error"]["code"]) == (409, "session_ended")
        assert [turn.side for turn in await them.turns()] == [""]


async def test_a_session_that_ended_stays_ended_when_later_ones_have_ended() -> None:
    async with gateways(saying("one"), limits=Limits(remembered_sessions=1)) as them:
        ended, later = await them.open(), await them.open("r1g1s1")
        await _talk(them, ended, [0])
        control = them.control(0)
        before = await them.turns()
        for handle in (ended, later):
            await control.close(handle.session_id)
        for number in range(2):
            assert (await them.post(number, ended, {"messages": [user("again")]}))[0] == 409
        assert await control.sessions() == [] and await them.turns() == before


async def test_only_its_own_key_moves_a_session() -> None:
    async with gateways(saying("one")) as them:
        mine, other = await them.open(), await them.open("r1g1s1")
        strangers = {
            "another session's": other.key,
            "cut": mine.key[:-1],
            "of another run": Mint(b"t" * 32).key(Ticket(mine.session_id, _about(), 0)),
            "no ticket": "key",
            "odd": "ä.ä",
        }
        for key in strangers.values():
            forged = SessionHandle(session_id=mine.session_id, key=key, path=mine.path)
            header = {"Authorization": f"Bearer {key}"} if key.isascii() else {}
            status, _ = await them.post(1, forged, {"messages": [user("go")]}, **header) if header else (404, None)
            assert status == 404
        assert await them.turns() == []


def _about() -> Any:
    from kat_stream.gateway.sessions import SessionRequest

    return SessionRequest(run="r1", group_id="g1", rollout_id="r1g1s0")


async def test_many_sessions_move_at_once_and_requests_of_one_share_its_move() -> None:
    async with gateways(saying("one", "two", "three")) as them:
        handles = [await them.open(f"r1g1s{n}") for n in range(32)]
        histories = [await _talk(them, handle, [0]) for handle in handles]
        await them.servers[0].close()
        async with anyio.create_task_group() as group:
            for handle, messages in zip(handles, histories, strict=True):
                group.start_soon(them.say, 1, handle, messages)
                group.start_soon(them.say, 1, handle, [*messages, user("also")])
        turns = await them.turns()
        assert sum(turn.side == CLAIM for turn in turns) == 32
        for handle in handles:
            own = await _close_at(them, 1, handle)
            assert len(own) == 3 and {turn.parent for turn in own[1:]} == {own[0].turn_id}


async def test_two_gateways_that_claim_at_once_leave_one_owner_and_one_line() -> None:
    async with gateways(saying("one", "two", "three", "four"), number=3) as them:
        handle = await them.open()
        messages = await _talk(them, handle, [0])
        await them.servers[0].close()
        statuses: list[int] = []

        async def ask(number: int) -> None:
            async def attempt() -> int:
                return (await them.post(number, handle, {"messages": messages}))[0]

            with anyio.fail_after(30):
                while (status := await attempt()) == 503:
                    await anyio.sleep(0.01 * (number + 1))
            statuses.append(status)

        async with anyio.create_task_group() as group:
            group.start_soon(ask, 1)
            group.start_soon(ask, 2)
        assert statuses == [200, 200]
        lineage = Lineage(handle.session_id)
        for turn in await them.turns():
            lineage.add(turn)
        counted = [turn for turn in lineage.turns if turn.finish_reason != "abort"]
        # A call that was aborted is in the tree too: the same prompt again shares most with it and hangs below it.
        assert {turn.parent for turn in counted[1:]} <= {turn.turn_id for turn in lineage.turns}
        assert len(await _close_at(them, 1, handle)) == len(lineage.turns)


async def test_a_gateway_that_stood_still_forgets_and_reads_again_what_it_had() -> None:
    pulse, forgotten = Pulse(stall_s=0.2), []
    assert not pulse.stalled()
    async with anyio.create_task_group() as group:
        group.start_soon(pulse.watch, lambda: forgotten.append(pulse.stalled()))
        await until(lambda: math.isfinite(pulse._beaten))
        assert not pulse.stalled() and not forgotten
        pulse._beaten -= 1.0  # as if the process had been stopped
        assert pulse.stalled()
        await until(lambda: bool(forgotten))
        await until(lambda: not pulse.stalled())
        group.cancel_scope.cancel()
    assert forgotten == [True]


async def test_a_session_is_read_from_the_log_after_a_stall() -> None:
    async with gateways(saying("one", "x" * 400), token_s=0.01) as them:
        handle = await them.open()
        messages = await _talk(them, handle, [0])
        answers: list[tuple[int, Any]] = []

        async def ask() -> None:
            answers.append(await them.post(0, handle, {"messages": messages}))

        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            await until(lambda: them.engine.in_flight == 1)
            takeover = them.servers[0]._takeover
            assert takeover is not None
            takeover.forget()
        assert answers[0][0] == 503
        assert (await them.say(0, handle, messages, max_tokens=3))["content"] == "xxx"
        first, claim, second = await them.turns()
        assert claim.side == CLAIM and (second.parent, second.claim) == (first.turn_id, claim.turn_id)


def test_the_secret_of_a_run_is_made_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    first = run_secret(tmp_path)
    assert run_secret(tmp_path) == first and len(first) == 32
    (file,) = tmp_path.iterdir()
    assert file.stat().st_mode & 0o077 == 0


_EVENTS = st.lists(
    st.tuples(st.sampled_from(["turn", "claim", "stale", "again", "other"]), st.integers(0, 5)), max_size=30
)


@given(_EVENTS)
def test_every_reader_agrees_which_turns_count(events: list[tuple[str, int]]) -> None:
    """Against the rule as it is said: a turn counts if it carries the newest claim before it, once."""
    records: list[Turn] = []
    claims, expected = [""], []
    for number, (kind, which) in enumerate(events):
        name = f"t{number}"
        claim = {"stale": claims[min(which, len(claims) - 1)]}.get(kind, claims[-1])
        turn = _turn(name, claim, "other" if kind == "other" else "s", CLAIM if kind == "claim" else "")
        if kind == "again" and records:
            turn = records[which % len(records)]
        elif kind == "claim":
            claims.append(name)
        elif kind != "other" and claim == claims[-1]:
            expected.append(name)
        records.append(turn)
    lineage = Lineage("s")
    for turn in records:
        lineage.add(turn)
    assert [turn.turn_id for turn in lineage.turns] == expected and lineage.claim == claims[-1]


def _turn(turn_id: str, claim: str, session: str, side: str) -> Turn:
    return Turn(
        run="r1",
        group_id="g1",
        rollout_id="r1g1s0",
        session_id=session,
        turn_id=turn_id,
        index=0,
        prompt_ids=b"",
        sampled_ids=b"",
        logprobs=b"",
        spans=(),
        finish_reason="stop",
        side=side,
        claim=claim,
    )


def test_the_scripted_replies_are_not_what_the_tokenizer_would_write() -> None:
    """What makes a reply that was encoded again visible in these tests."""
    assert by_bytes("ls -la", end=False) != tokenizer(CHATML).encode("ls -la", add_special_tokens=False)
