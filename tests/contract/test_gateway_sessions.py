"""Sessions as trees: threads, forks by cause, side requests, re-serialised histories, retries (promise 6)."""

from __future__ import annotations

import gc
import json
import random
from pathlib import Path
from typing import Any

import anyio
import pytest

from kat_stream.gateway.app import SessionHandle
from kat_stream.gateway.calls import Call
from kat_stream.gateway.limits import Limits
from tests.contract.gateway_kit import (
    CHATML,
    FORGETFUL,
    THINKING,
    Gates,
    World,
    by_bytes,
    paths,
    saying,
    user,
    world,
)
from tests.waiting import until
from topics import Sampling, Turn

pytestmark = pytest.mark.anyio

BASH = {"type": "function", "function": {"name": "bash", "parameters": {"type": "object", "properties": {}}}}
EDIT = {"type": "function", "function": {"name": "edit", "parameters": {"type": "object", "properties": {}}}}
CAPTURES = Path(__file__).parent / "captures"


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


async def _ask(w: World, handle: SessionHandle, messages: list[Any], headers: dict[str, str] = {}, **more: Any) -> str:  # noqa: B006
    status, body = await w.post(handle, "v1/chat/completions", {"model": "m", "messages": messages, **more}, **headers)
    assert status == 200, body
    return str(body["choices"][0]["message"]["content"] or "")


async def test_sub_agents_are_threads_of_their_own_and_do_not_fork_the_main_one() -> None:
    async with world(saying("ls", "cat", "ca")) as w:
        handle = await w.session()
        main, other = [system("Mend."), user("go")], [system("You explore."), user("look")]
        await _ask(w, handle, main)
        await _ask(w, handle, other)
        await _ask(w, handle, [*main, assistant("ls"), user("on")])
        await _ask(w, handle, [*other, assistant("ls"), user("on")])
        turns = await w.control.close(handle.session_id)
        assert [turn.fork for turn in turns] == ["", "subagent", "", ""]
        assert turns[0].thread == turns[2].thread != turns[1].thread == turns[3].thread
        assert (turns[2].parent, turns[3].parent) == (turns[0].turn_id, turns[1].turn_id)
        assert all(turn.trainable for turn in turns)


async def test_threads_have_the_names_that_agents_give_them() -> None:
    async with world(saying("ls", "cat")) as w:
        handle = await w.session()
        names = [{"thread-id": "main-1"}, {"thread-id": "sub-2"}, {"thread-id": "bad name\u00e9"}]
        for headers in names[:2]:
            await _ask(w, handle, [user("go")], headers)
        await _ask(w, handle, [user("a summary")], names[0])
        turns = await w.control.close(handle.session_id)
        assert [turn.thread for turn in turns] == ["main-1", "sub-2", "main-1"]
        assert [turn.fork for turn in turns] == ["", "subagent", "other"]


async def test_a_second_continuation_is_a_branch() -> None:
    async with world(saying("ls", "cat")) as w:
        handle = await w.session()
        for last in ("on", "off"):
            await _ask(w, handle, [user("go"), assistant("ls"), user(last)] if last == "off" else [user("go")])
        await _ask(w, handle, [user("go"), assistant("ls"), user("<fork-boilerplate>")])
        turns = await w.control.close(handle.session_id)
        assert [turn.fork for turn in turns] == ["", "", "branch"]
        assert turns[2].parent in (turns[0].turn_id, turns[1].turn_id) and turns[2].prefix_len >= turns[1].prefix_len


async def test_tools_that_come_later_fork_by_their_name_and_keep_the_history() -> None:
    async with world(saying("ls", "cat")) as w:
        handle = await w.session()
        await _ask(w, handle, [user("go")], tools=[BASH])
        await _ask(w, handle, [user("go"), assistant("ls"), user("on")], tools=[EDIT, BASH])
        turns = await w.control.close(handle.session_id)
        assert turns[1].fork == "tools" and turns[0].tools != turns[1].tools
        assert paths(turns)[turns[1].turn_id][0] == w.engines[0].requests[1].input_ids


async def test_cache_marks_on_tools_and_texts_change_nothing() -> None:
    async with world(saying("ls", "cat")) as w:
        handle = await w.session()
        marked = {**BASH, "cache_control": {"type": "ephemeral"}}
        text = [{"type": "text", "text": "go", "cache_control": {"type": "ephemeral"}}]
        await _ask(w, handle, [{"role": "user", "content": text}], tools=[marked])
        await _ask(w, handle, [user("go"), assistant("ls"), user("on")], tools=[BASH])
        assert [turn.fork for turn in await w.control.close(handle.session_id)] == ["", ""]


async def test_thinking_that_an_agent_drops_is_remembered() -> None:
    async with world(saying("<think>\nhm\n</think>\n\nls", "cat"), template=THINKING) as w:
        handle = await w.session()
        assert await _ask(w, handle, [user("go")]) == "ls"
        for echo in (assistant("ls"), assistant("ls", reasoning_content="hm "), assistant("ls", reasoning_content="x")):
            await _ask(w, handle, [user("go"), echo, user("on")])
        turns = await w.control.close(handle.session_id)
        assert [turn.fork for turn in turns] == ["", "", "branch", "branch"]
        first = by_bytes("<think>\nhm\n</think>\n\nls")
        for seen in w.engines[0].requests[1:]:
            assert any(seen.input_ids[i : i + len(first)] == first for i in range(len(seen.input_ids)))


async def test_of_equal_replies_the_one_that_was_thought_so_goes_on() -> None:
    said = iter(("<think>\na\n</think>\n\nls", "<think>\nb\n</think>\n\nls", "cat"))
    async with world(lambda _: by_bytes(next(said)), template=THINKING) as w:
        handle = await w.session()
        await _ask(w, handle, [user("go")])
        await _ask(w, handle, [user("go")])
        await _ask(w, handle, [user("go"), assistant("ls", reasoning_content="a"), user("on")])
        turns = await w.control.close(handle.session_id)
        assert (turns[2].parent, turns[2].fork) == (turns[0].turn_id, "")


async def test_a_template_that_strips_thinking_forks_by_that_name() -> None:
    async with world(saying("<think>hm</think>ls", "ca"), template=FORGETFUL) as w:
        handle = await w.session()
        await _ask(w, handle, [user("go")])
        await _ask(w, handle, [user("go"), assistant("ls", reasoning_content="hm"), user("on")])
        assert [turn.fork for turn in await w.control.close(handle.session_id)] == ["", "thinking"]


async def test_compaction_with_and_without_instructions() -> None:
    async with world(saying("ls", "cat", "ca")) as w:
        handle = await w.session()
        history = [system("Mend."), user("go")]
        await _ask(w, handle, history)
        await _ask(w, handle, [*history, assistant("ls"), user("on")])
        await _ask(w, handle, [system("Mend."), user("This session is being continued")])
        await _ask(w, handle, [user("<summary>")])
        turns = await w.control.close(handle.session_id)
        assert [turn.fork for turn in turns] == ["", "", "compaction", "compaction"]


@pytest.mark.parametrize(
    ("messages", "more", "reason"),
    [
        ([user("go")], {"model": "policy-small"}, "model"),
        ([user("quota")], {"max_tokens": 1}, "probe"),
        ([system("You are a title generator. You output ONLY a title."), user("x")], {}, "title"),
        ([system("You are an engineer that generates concise Git commit messages."), user("x")], {}, "commit"),
    ],
)
async def test_side_requests_are_served_and_recorded_and_not_trained(
    messages: list[Any], more: dict[str, Any], reason: str
) -> None:
    async with world(saying("ls", "cat")) as w:
        handle = await w.session(Sampling(max_turns=1))
        assert await _ask(w, handle, messages, **more) == ("l" if reason == "probe" else "ls")
        await _ask(w, handle, [system("Mend."), user("go")])
        side, main = await w.control.close(handle.session_id)
        assert (side.side, side.trainable, side.fork) == (reason, False, "")
        assert (main.side, main.trainable, main.fork) == ("", True, "")


async def test_what_was_asked_for_is_recorded_and_not_obeyed() -> None:
    async with world(saying("ls")) as w:
        handle = await w.session(Sampling(temperature=0.7, max_new_tokens=30))
        body = {
            "model": "m", "max_tokens": 64000, "temperature": 0, "thinking": {"type": "adaptive"},
            "messages": [user("go")], "metadata": {"user_id": "u"}, "context_management": {"edits": []},
        }  # fmt: skip
        status, _ = await w.post(handle, "v1/messages", body)
        (turn,) = await w.control.close(handle.session_id)
        seen = w.engines[0].requests[0].sampling_params
        assert (status, seen.temperature, seen.max_new_tokens) == (200, 0.7, 30)
        asked = json.loads(turn.asked)
        assert (asked["max_tokens"], asked["temperature"], asked["thinking"]) == (64000, 0.0, {"type": "adaptive"})


async def test_an_answer_that_nobody_got_is_given_to_the_retry() -> None:
    """A client that gave up just before the end asks the same again, as a whole answer instead of a stream."""
    async with world(saying("ls"), token_s=0.02, limits=Limits(disconnect_grace_s=20.0)) as w:
        handle = await w.session()
        body = {"model": "m", "messages": [user("go")]}
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: w.post(handle, "v1/chat/completions", body | {"stream": True}))
            await until(lambda: w.engines[0].in_flight == 1)
            group.cancel_scope.cancel()
        await until(lambda: w.engines[0].in_flight == 0)
        answers = [(await w.post(handle, "v1/chat/completions", {**body, "stream": False}))[1] for _ in range(2)]
        assert [answer["choices"][0]["message"]["content"] for answer in answers] == ["ls", "ls"]
        turns = await w.control.close(handle.session_id)
        assert len(turns) == 2 and all(turn.trainable for turn in turns), "the retry joined, the second ask is new"


@pytest.mark.parametrize("side", [False, True])
async def test_turns_are_bounded_also_when_they_are_asked_for_at_once(side: bool) -> None:
    async with world(saying("ls"), token_s=0.02) as w:
        handle = await w.session(Sampling(max_turns=2))
        answers: list[tuple[int, dict[str, Any]]] = []

        async def ask(number: int) -> None:
            body = {"model": "policy-small" if side else "m", "messages": [user(f"go {number}")]}
            answers.append(await w.post(handle, "v1/chat/completions", body))

        async with anyio.create_task_group() as group:
            for number in range(6):
                group.start_soon(ask, number)
            # What is asked beside the task takes nothing from it.
            await _ask(w, handle, [user("go")], model="m" if side else "policy-small")
        refused = [body["error"]["code"] for status, body in answers if status != 200]
        assert refused == ["turn_limit_reached"] * 4
        assert len(await w.control.close(handle.session_id)) == 3


async def test_the_retry_of_a_last_turn_that_is_being_aborted_is_served() -> None:
    gates = Gates()
    limits = Limits(disconnect_grace_s=0.0)
    async with world(saying("ls " * 100), token_s=0.005, limits=limits, wrap=gates) as w:
        handle = await w.session(Sampling(max_turns=1))
        body = {"model": "m", "messages": [user("go")], "max_tokens": 20}
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: w.post(handle, "v1/chat/completions", body))
            await until(lambda: w.engines[0].in_flight == 1)
            group.cancel_scope.cancel()
        await until(lambda: gates[0].waiting == 1)
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: w.post(handle, "v1/chat/completions", body))
            await until(lambda: gates[0].waiting == 2)
            gates[0].open.set()
        turns = await w.control.close(handle.session_id)
        assert [turn.finish_reason for turn in turns] == ["abort", "length"]


SERIALISERS = ("plain", "blocks", "null", "dropped", "trimmed", "ids", "javascript")


def _again(message: dict[str, Any], how: str) -> dict[str, Any]:
    """The same message as another client, or the same one a turn later, would write it."""
    out = dict(message)
    calls = out.get("tool_calls")
    if how == "blocks" and out["content"]:
        out["content"] = [{"type": "text", "text": out["content"], "cache_control": {"type": "ephemeral"}}]
    if how == "null" and not out["content"]:
        out["content"] = None
    if how == "trimmed" and out["role"] == "assistant":
        out["reasoning_content"] = "hm"
    if calls and how != "plain":
        arguments = [json.loads(call["function"]["arguments"]) for call in calls]
        if how == "javascript":  # it knows one kind of number
            arguments = [{key: _as_javascript(value) for key, value in a.items()} for a in arguments]
        texts = [json.dumps(dict(reversed(a.items())), indent=1 if how == "blocks" else None) for a in arguments]
        out["tool_calls"] = [
            {"id": call["id"][1:] if how == "ids" else call["id"], "type": "function",
             "function": {"name": call["function"]["name"], "arguments": text}}
            for call, text in zip(calls, texts, strict=True)
        ]  # fmt: skip
    if how == "ids" and out["role"] == "tool":
        out["tool_call_id"] = out["tool_call_id"][1:]
    return out


def _as_javascript(value: Any) -> Any:
    """A value as JSON.stringify(JSON.parse(...)) leaves it."""
    if isinstance(value, list):
        return [_as_javascript(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


SAYS = (
    '<think>\nhm\n</think>\n\nI look.\n<tool_call>\n{"name": "bash", "arguments": {"a":  "ls", "b": 1}}\n</tool_call>',
    '<tool_call>\n{"name": "bash", "arguments": {"a": "cat", "b": [10.0, {"c": 0.5}, -0.0]}}\n</tool_call>',
    "ls -la",
)


def _policy(prompt: list[int]) -> list[int]:
    """What it says depends on all that stands before it, so equal prompts get equal replies."""
    return by_bytes(SAYS[sum(prompt) % len(SAYS)])


async def _grow(w: World, seed: int, order: random.Random, written: random.Random) -> set[tuple[Any, ...]]:
    """A tree of conversations that `seed` determines, asked in `order`, echoed as `written`; its paths of ids."""
    handle = await w.session()
    shape = random.Random(seed)
    plans = [[shape.randint(0, 2) for _ in range(shape.randint(1, 4))] for _ in range(shape.randint(2, 5))]
    talks: list[list[dict[str, Any]]] = [[system("Mend."), user("go")] for _ in plans]
    while any(plans):
        at = order.choice([i for i, plan in enumerate(plans) if plan])
        step, talk = plans[at].pop(0), talks[at]
        body = {"model": "m", "tools": [BASH], "messages": [_again(m, written.choice(SERIALISERS)) for m in talk]}
        status, answer = await w.post(handle, "v1/chat/completions", body)
        assert status == 200, answer
        message = answer["choices"][0]["message"]
        talk.append(
            {key: message[key] for key in ("role", "tool_calls") if key in message}
            | {"content": message["content"] or ""}
        )
        results = [
            {"role": "tool", "tool_call_id": call["id"], "content": f"seen {step}"}
            for call in message.get("tool_calls", [])
        ]
        talk.extend(results or [user(f"on {step}")])
    turns = await w.control.close(handle.session_id)
    assert all(turn.fork in ("", "branch") for turn in turns), [turn.fork for turn in turns]
    return {(tuple(prompt), tuple(sampled)) for prompt, sampled in paths(turns).values()}


async def test_random_trees_are_the_same_in_every_order_and_writing() -> None:
    async with world(_policy, template=THINKING, tools="hermes") as w:
        for seed in range(8):
            trees = [await _grow(w, seed, random.Random(i), random.Random(100 + i)) for i in range(3)]
            assert trees[0] == trees[1] == trees[2] and len(trees[0]) >= 2
            plain = await _grow(w, seed, random.Random(0), _Plain())
            assert plain == trees[0]


class _Plain(random.Random):
    """Nothing is written in another way."""

    def choice(self, seq: Any) -> Any:
        return seq[0]


@pytest.mark.parametrize("capture", sorted(path.stem for path in CAPTURES.glob("*.json")))
async def test_what_real_agents_sent_is_served_on_its_wire(capture: str) -> None:
    sent = json.loads((CAPTURES / f"{capture}.json").read_text())
    async with world(saying("ls"), template=CHATML) as w:
        handle = await w.session(Sampling(max_context=1 << 17))
        path = "v1/" + sent["path"].partition("/v1/")[2]
        url, key = f"{w.server.data_url}{handle.path}/{path}", {"x-api-key": handle.key}
        skipped = ("authorization", "x-api-key", "content-length", "connection", "host", "accept-encoding")
        headers = {k: v for k, v in sent["headers"] if k.lower() not in skipped and v.isascii()}
        async with w.http.post(url, json=sent["body"], headers=headers | key) as answer:
            text = await answer.text()
        assert answer.status == 200, text
        ended = ("[DONE]", "message_stop", "response.completed", '"finish_reason"')
        assert any(mark in text for mark in ended) and '"ls"' in text
        (turn,) = await w.control.close(handle.session_id)
        assert _whole_request(turn, w) and turn.dialect in path.replace("chat/completions", "chat")


def _whole_request(turn: Turn, w: World) -> bool:
    return paths([turn])[turn.turn_id][0] == w.engines[0].requests[0].input_ids and turn.messages >= 2


@pytest.mark.parametrize("stream", [False, True])
async def test_an_ended_call_that_is_not_remembered_is_no_garbage(stream: bool) -> None:
    """It is gone at once: what waits for the search for garbage makes it long, and it stops all calls."""
    async with world(saying("ls"), limits=Limits(remembered_calls=1)) as w:
        handle = await w.session()
        url, headers = f"{w.server.data_url}{handle.path}/v1/chat/completions", {"x-api-key": handle.key}
        gc.collect()
        gc.disable()
        try:
            for number in range(4):
                body = {"model": "m", "messages": [user(f"task {number}")], "stream": stream}
                async with w.http.post(url, json=body, headers=headers) as answer:
                    assert answer.status == 200 and "ls" in await answer.text()
            left = sum(isinstance(known, Call) for known in gc.get_objects())
        finally:
            gc.enable()
        assert left == 1
