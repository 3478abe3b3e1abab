"""Agents with the official client: replies, streams, and token-exact sessions (promise 6)."""

from __future__ import annotations

import json

import anyio
import pytest

from kat_stream.engines.scripted import scripted_logprob
from kat_stream.gateway.app import SessionHandle
from tests.contract.gateway_kit import FORGETFUL, World, by_bytes, paths, saying, tokenizer, user, world
from topics import Sampling, Turn
from topics.record import floats, ints

pytestmark = pytest.mark.anyio


async def test_a_reply_and_its_record() -> None:
    async with world(saying("ls -la")) as w:
        handle = await w.session()
        answer = await w.client(handle).chat.completions.create(
            model="m", messages=[{"role": "system", "content": "Mend."}, user("go")], temperature=0.1, max_tokens=50
        )
        assert answer.choices[0].message.content == "ls -la"
        assert answer.choices[0].finish_reason == "stop"
        (turn,) = await w.control.close(handle.session_id)
        assert [turn] == await w.published()
        seen = w.engines[0].requests[0]
        assert list(ints(turn.prompt_ids)) == seen.input_ids
        assert list(ints(turn.sampled_ids)) == by_bytes("ls -la")
        assert list(floats(turn.logprobs)) == [scripted_logprob(token) for token in by_bytes("ls -la")]
        assert (turn.group_id, turn.rollout_id, turn.index, turn.parent, turn.fork) == ("g1", "r1g1s0", 0, "", "")
        assert turn.trainable and turn.turn_id.isalnum() and '"temperature":0.1' in turn.asked
        assert seen.sampling_params.temperature == 1.0 and seen.sampling_params.max_new_tokens == 50
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(seen.input_ids), 7)


async def test_turns_go_on_from_the_sampled_ids() -> None:
    async with world(saying("ls -la", "cat a", "ca")) as w:
        handle = await w.session()
        client = w.client(handle)
        messages = [{"role": "system", "content": "Mend."}, user("ls -l")]
        for _ in range(3):
            answer = await client.chat.completions.create(model="m", messages=messages)
            messages.append({"role": "assistant", "content": answer.choices[0].message.content})
            messages.append(user("cat: ls -la"))
        turns = await w.control.close(handle.session_id)
        assert [turn.fork for turn in turns] == ["", "", ""]
        assert [turn.parent for turn in turns] == ["", turns[0].turn_id, turns[1].turn_id]
        whole = paths(turns)
        for turn, seen in zip(turns, w.engines[0].requests, strict=True):
            assert whole[turn.turn_id][0] == seen.input_ids
        last = [*whole[turns[2].turn_id][0], *whole[turns[2].turn_id][1]]
        text = tokenizer().decode(last)
        assert tokenizer().encode(text, add_special_tokens=False) != last
        assert "ls -la<|im_end|>\n<|im_start|>user\ncat: ls -la<|im_end|>\n<|im_start|>assistant\ncat a" in text


async def _talk(w: World, handle: SessionHandle, *rounds: list[dict[str, str]]) -> list[Turn]:
    """One call after another with exactly these messages; all turns."""
    client = w.client(handle)
    for messages in rounds:
        await client.chat.completions.create(model="m", messages=messages)
    return await w.control.close(handle.session_id)


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


async def test_a_reply_cut_by_length_is_closed_by_the_template_and_kept() -> None:
    async with world(saying("ls -la and more", "ca")) as w:
        handle = await w.session(Sampling(max_new_tokens=4))
        answer = await w.client(handle).chat.completions.create(model="m", messages=[user("go")])
        assert (answer.choices[0].finish_reason, answer.choices[0].message.content) == ("length", "ls -")
        turns = await _talk(w, handle, [user("go"), _assistant("ls -"), user("on")])
        assert (turns[1].parent, turns[1].fork) == (turns[0].turn_id, "")
        after = tokenizer().encode("<|im_end|>\n<|im_start|>user\non<|im_end|>\n<|im_start|>assistant\n")
        assert list(ints(turns[1].prompt_ids)) == after
        assert w.engines[0].requests[1].input_ids == paths(turns)[turns[1].turn_id][0]


async def test_content_as_parts_is_the_same_reply() -> None:
    async with world(saying("ls", "ca")) as w:
        handle = await w.session()
        echoed = {"role": "assistant", "content": [{"type": "text", "text": "ls"}]}
        turns = await _talk(w, handle, [user("go")], [user("go"), echoed, user("on")])
        assert (turns[1].parent, turns[1].prefix_len) == (
            turns[0].turn_id,
            len(paths(turns[:1])[turns[0].turn_id][0]) + 3,
        )


@pytest.mark.parametrize(
    ("second", "fork"),
    [
        ([user("go"), _assistant("cat"), user("on")], "other"),
        ([user("go"), _assistant("ls \n"), user("on")], "retokenisation"),
        ([user("a summary of all that")], "compaction"),
    ],
)
async def test_an_edited_history_forks_and_says_why(second: list[dict[str, str]], fork: str) -> None:
    async with world(saying("ls ", "ca")) as w:
        handle = await w.session()
        first = [{"role": "system", "content": "Mend."}, user("go")]
        second = second if fork == "compaction" else [first[0], *second]
        turns = await _talk(w, handle, first, second)
        assert turns[1].fork == fork
        whole = paths(turns)
        assert whole[turns[1].turn_id][0] == w.engines[0].requests[1].input_ids
        text = tokenizer().apply_chat_template(second, tokenize=False, add_generation_prompt=True)
        assert whole[turns[1].turn_id][0] == tokenizer().encode(text, add_special_tokens=False)


async def test_a_template_that_rewrites_history_forks() -> None:
    async with world(saying("<think>hm</think>ls", "ca"), template=FORGETFUL) as w:
        handle = await w.session()
        turns = await _talk(w, handle, [user("go")], [user("go"), _assistant("ls"), user("on")])
        assert (turns[1].fork, turns[0].reasoning, turns[0].content) == ("thinking", "hm", "ls")
        assert "hm" not in tokenizer().decode(w.engines[0].requests[1].input_ids)


async def test_tool_calls_come_back_re_serialised_and_stay_the_same_turn() -> None:
    said = 'I look.\n<tool_call>\n{"name":"bash",  "arguments":{"command":"ls","b":1}}\n</tool_call>'
    tools = [{"type": "function", "function": {"name": "bash", "parameters": {"type": "object", "properties": {}}}}]
    async with world(saying(said, "ca"), tools="hermes") as w:
        handle = await w.session()
        client = w.client(handle)
        messages: list[dict[str, object]] = [dict(user("go"))]
        answer = await client.chat.completions.create(model="m", messages=messages, tools=tools)
        choice = answer.choices[0]
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I look.")
        (call,) = choice.message.tool_calls or ()
        assert (call.function.name, json.loads(call.function.arguments)) == ("bash", {"command": "ls", "b": 1})
        assert call.id.isalnum()
        function = {"name": "bash", "arguments": '{"b": 1, "command": "ls"}'}
        echo = {
            "role": "assistant",
            "content": "I look.",
            "tool_calls": [{"id": "x", "type": "function", "function": function}],
        }
        messages += [echo, {"role": "tool", "content": "a.txt", "tool_call_id": call.id}]
        await client.chat.completions.create(model="m", messages=messages, tools=tools)
        turns = await w.control.close(handle.session_id)
        assert (turns[1].fork, turns[1].parent) == ("", turns[0].turn_id)
        assert paths(turns)[turns[1].turn_id][0] == w.engines[0].requests[1].input_ids
        assert said + "<|im_end|>\n<|im_start|>tool\na.txt" in tokenizer().decode(w.engines[0].requests[1].input_ids)
        assert json.loads(turns[0].tool_calls)[0]["name"] == "bash"


async def test_a_tool_call_that_does_not_parse_stays_text() -> None:
    said = '<tool_call>\n{"name": "bash", "arguments": {"command"\n</tool_call>'
    tools = [{"type": "function", "function": {"name": "bash"}}]
    async with world(saying(said), tools="hermes") as w:
        handle = await w.session()
        answer = await w.client(handle).chat.completions.create(model="m", messages=[user("go")], tools=tools)
        assert (answer.choices[0].message.content, answer.choices[0].message.tool_calls) == (said, None)


async def test_siblings_at_once_share_their_parent() -> None:
    async with world(saying("ls", "cat"), token_s=0.002) as w:
        handle = await w.session()
        client = w.client(handle)
        await client.chat.completions.create(model="m", messages=[user("go")])
        second = [user("go"), _assistant("ls"), user("on")]
        async with anyio.create_task_group() as group:
            for _ in range(4):
                group.start_soon(lambda: client.chat.completions.create(model="m", messages=second))
        turns = await w.control.close(handle.session_id)
        assert len(turns) == 5 and len({turn.turn_id for turn in turns}) == 5
        assert {turn.parent for turn in turns[1:]} == {turns[0].turn_id}
        assert [turn.index for turn in turns] == [0, 1, 2, 3, 4]
        assert len(w.engines[0].requests) == 5


async def test_256_sessions_at_once() -> None:
    async with world(saying("ls", "cat"), engines=2) as w:

        async def agent(number: int) -> None:
            handle = await w.session(group=f"g{number % 32}")
            base = f"{w.server.data_url}{handle.path}/v1/chat/completions"
            messages = [user(f"task {number}")]
            for said in ("ls", "cat"):
                headers = {"Authorization": f"Bearer {handle.key}"}
                async with w.http.post(base, json={"model": "m", "messages": messages}, headers=headers) as answer:
                    body = await answer.json()
                assert body["choices"][0]["message"]["content"] == said
                messages = [*messages, _assistant(said), user("on")]
            turns = await w.control.close(handle.session_id)
            assert [turn.fork for turn in turns] == ["", ""] and len(paths(turns)) == 2

        async with anyio.create_task_group() as group:
            for number in range(256):
                group.start_soon(agent, number)
        assert len(await w.published()) == 512
        assert all(len(engine.requests) > 150 for engine in w.engines)
        assert all(state.in_flight == 0 for state in w.router.list())
