"""A session moves between gateways: rebuilt from `turns`, it goes on exactly where it was, with unbroken lineage."""

from __future__ import annotations

import math
from typing import Any

import anyio
import pytest

from kat_stream.gateway.app import GatewayControl
from kat_stream.gateway.peers import Pulse
from kat_stream.gateway.takeover import CLAIM
from tests.contract.gateway_kit import CHATML, OWN_IDS, by_bytes, paths, saying, tokenizer, user
from tests.contract.takeover_kit import gateways
from tests.waiting import until
from topics import Sampling, Turn

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("at", [[0, 0, 1], [0, 1, 0, 1], [1, 1]], ids=["moved", "back and forth", "before a turn"])
async def test_a_session_that_moves_goes_on_exactly_where_it_was(at: list[int]) -> None:
    async with gateways(saying("ls -la", "cat x", "done", "more")) as them:
        handle = await them.open()
        await them.talk(handle, at)
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


async def test_many_sessions_move_at_once_and_requests_of_one_share_its_move() -> None:
    async with gateways(saying("one", "two", "three")) as them:
        handles = [await them.open(f"r1g1s{n}") for n in range(32)]
        histories = [await them.talk(handle, [0]) for handle in handles]
        await them.servers[0].close()
        async with anyio.create_task_group() as group:
            for handle, messages in zip(handles, histories, strict=True):
                group.start_soon(them.say, 1, handle, messages)
                group.start_soon(them.say, 1, handle, [*messages, user("also")])
        turns = await them.turns()
        assert sum(turn.side == CLAIM for turn in turns) == 32
        for handle in handles:
            own = await them.close_at(1, handle)
            assert len(own) == 3 and {turn.parent for turn in own[1:]} == {own[0].turn_id}


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
        messages = await them.talk(handle, [0])
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


def test_the_scripted_replies_are_not_what_the_tokenizer_would_write() -> None:
    """What makes a reply that was encoded again visible in these tests."""
    assert by_bytes("ls -la", end=False) != tokenizer(CHATML).encode("ls -la", add_special_tokens=False)
