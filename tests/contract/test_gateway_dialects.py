"""Every wire with its official client: whole and streamed, tools, reasoning, counts, and histories that come back."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable
from typing import Any

import anthropic
import openai
import pytest
from google.genai import errors as google_errors
from google.genai import types as google

from kat_stream.gateway.app import SessionHandle
from kat_stream.gateway.dialects.google import GenerateContent
from kat_stream.gateway.limits import Limits
from kat_stream.gateway.side import side_reason
from tests.contract.gateway_kit import THINKING, World, by_bytes, paths, saying, tokenizer, world
from topics import Sampling, Turn

pytestmark = pytest.mark.anyio

SCHEMA = {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}
TWO_CALLS = (
    "<think>\nhm\n</think>\n\nI look.\n"
    '<tool_call>\n{"name": "bash",  "arguments": {"command": "ls", "b": 1}}\n</tool_call>\n'
    '<tool_call>\n{"name": "bash", "arguments": {"command": "cat a"}}\n</tool_call>'
)
Said = tuple[str, str, list[tuple[str, dict[str, Any]]], str]
"""Reasoning, content, calls and why it ended, as a client understood them."""
EXPECTED: Said = ("hm", "I look.", [("bash", {"command": "ls", "b": 1}), ("bash", {"command": "cat a"})], "tools")


async def _anthropic(w: World, handle: SessionHandle, *, stream: bool) -> list[Said]:
    """Three calls, each with the whole history, in blocks that a client re-serialised."""
    client, out = w.anthropic(handle), list[Said]()
    tools: Any = [{"name": "bash", "description": "a shell", "input_schema": SCHEMA}]
    messages: list[Any] = [{"role": "user", "content": "go"}]
    for turn in range(3):
        asked: dict[str, Any] = {"model": "m", "max_tokens": 200, "system": "Mend.", "messages": messages}
        if stream:
            async with client.messages.stream(**asked, tools=tools) as events:
                answer = await events.get_final_message()
        else:
            answer = await client.messages.create(**asked, tools=tools)
        calls = [(block.name, dict(block.input)) for block in answer.content if block.type == "tool_use"]
        thought = "".join(block.thinking for block in answer.content if block.type == "thinking")
        text = "".join(block.text for block in answer.content if block.type == "text")
        out.append((thought, text, calls, {"tool_use": "tools"}.get(answer.stop_reason or "", "stop")))
        assert answer.usage.output_tokens > 0 and answer.usage.input_tokens > 0
        results = [
            {"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": f"seen {i}"}]}
            for i, block in enumerate(block for block in answer.content if block.type == "tool_use")
        ]
        # Marks move and texts become lists between two requests, as Claude Code does it.
        messages[0] = {
            "role": "user",
            "content": [{"type": "text", "text": "go", "cache_control": {"type": "ephemeral"}}],
        }
        messages.append(
            {"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in answer.content]}
        )
        messages.append({"role": "user", "content": results or f"on {turn}"})
    return out


async def _responses(w: World, handle: SessionHandle, *, stream: bool) -> list[Said]:
    client, out = w.client(handle), list[Said]()
    tools: Any = [{"type": "function", "name": "bash", "parameters": SCHEMA, "strict": False}, {"type": "web_search"}]
    items: list[Any] = [
        {"role": "developer", "content": "Mend."},
        {"role": "user", "content": [{"type": "input_text", "text": "go"}]},
    ]
    for turn in range(3):
        if stream:
            async with client.responses.stream(model="m", input=items, tools=tools) as events:
                numbers = [event.sequence_number async for event in events]
                answer = await events.get_final_response()
            assert numbers == list(range(len(numbers)))
        else:
            answer = await client.responses.create(model="m", input=items, tools=tools)
        calls = [(item.name, json.loads(item.arguments)) for item in answer.output if item.type == "function_call"]
        thought = "".join(
            part.text for item in answer.output if item.type == "reasoning" for part in item.content or ()
        )
        assert answer.status == "completed" and answer.usage is not None and answer.usage.output_tokens > 0
        out.append((thought, answer.output_text, calls, "tools" if calls else "stop"))
        echoed = [item.model_dump(exclude_none=True, mode="json") for item in answer.output]
        for item in echoed:
            if item["type"] == "reasoning":  # a client that keeps the sealed form only
                item.pop("content")
        ids = [item.call_id for item in answer.output if item.type == "function_call"]
        results = [{"type": "function_call_output", "call_id": id_, "output": f"seen {i}"} for i, id_ in enumerate(ids)]
        items += [*echoed, *(results or [{"role": "user", "content": f"on {turn}"}])]
    return out


async def _chat(w: World, handle: SessionHandle, *, stream: bool) -> list[Said]:
    client, out = w.client(handle), list[Said]()
    tools: Any = [{"type": "function", "function": {"name": "bash", "parameters": SCHEMA}}]
    messages: list[Any] = [{"role": "developer", "content": "Mend."}, {"role": "user", "content": "go"}]
    for turn in range(3):
        if stream:
            async with client.chat.completions.stream(model="m", messages=messages, tools=tools) as events:
                choice = (await events.get_final_completion()).choices[0]
        else:
            choice = (await client.chat.completions.create(model="m", messages=messages, tools=tools)).choices[0]
        known = choice.message.tool_calls or []
        calls = [(call.function.name, json.loads(call.function.arguments)) for call in known if call.type == "function"]
        thought = getattr(choice.message, "reasoning_content", None) or ""
        out.append((thought, choice.message.content or "", calls, "tools" if calls else "stop"))
        # Reasoning is dropped, arguments are written anew and in another order, ids lose a character.
        echoed = [
            {
                "id": call.id[1:],
                "type": "function",
                "function": {"name": "bash", "arguments": json.dumps(dict(reversed(list(arguments.items()))))},
            }
            for call, (_, arguments) in zip(known, calls, strict=True)
        ]
        message: dict[str, Any] = {"role": "assistant", "content": choice.message.content or None}
        messages.append(message | ({"tool_calls": echoed} if echoed else {}))
        results = [{"role": "tool", "tool_call_id": c["id"], "content": f"seen {i}"} for i, c in enumerate(echoed)]
        messages += results or [{"role": "user", "content": f"on {turn}"}]
    return out


async def _google(w: World, handle: SessionHandle, *, stream: bool) -> list[Said]:
    client, out = w.google(handle), list[Said]()
    declared = google.FunctionDeclaration(name="bash", parameters_json_schema=SCHEMA)
    config = google.GenerateContentConfig(
        system_instruction="Mend.",
        tools=[google.Tool(function_declarations=[declared])],
        automatic_function_calling=google.AutomaticFunctionCallingConfig(disable=True),
    )
    contents: list[Any] = [google.UserContent("go")]
    for turn in range(3):
        if stream:
            parts: list[google.Part] = []
            async for chunk in await client.aio.models.generate_content_stream(
                model="m", contents=contents, config=config
            ):
                parts += (
                    chunk.candidates[0].content.parts if chunk.candidates and chunk.candidates[0].content else []
                ) or []
        else:
            answer = await client.aio.models.generate_content(model="m", contents=contents, config=config)
            assert answer.candidates and answer.candidates[0].content and answer.usage_metadata
            parts = answer.candidates[0].content.parts or []
        called = [part.function_call for part in parts if part.function_call]
        calls = [(call.name or "", dict(call.args or {})) for call in called]
        thought = "".join(part.text or "" for part in parts if part.thought)
        text = "".join(part.text or "" for part in parts if not part.thought)
        out.append((thought, text, calls, "tools" if calls else "stop"))
        results = [
            google.Part.from_function_response(name="bash", response={"output": f"seen {i}"})
            for i, _ in enumerate(called)
        ]
        contents += [google.ModelContent(parts), google.UserContent(results or f"on {turn}")]
    return out


SPEAKERS: dict[str, Callable[..., Awaitable[list[Said]]]] = {
    "chat": _chat,
    "messages": _anthropic,
    "responses": _responses,
    "google": _google,
}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("wire", sorted(SPEAKERS))
async def test_a_conversation_with_tools_and_reasoning(wire: str, stream: bool) -> None:
    async with world(saying(TWO_CALLS, "cat a", "ca"), tools="hermes", template=THINKING, token_s=0.0002) as w:
        handle = await w.session()
        said = await SPEAKERS[wire](w, handle, stream=stream)
        assert said == [EXPECTED, ("", "cat a", [], "stop"), ("", "ca", [], "stop")]
        turns = await w.control.close(handle.session_id)
        assert [turn.dialect for turn in turns] == [wire] * 3
        _check_history(w, turns)


@pytest.mark.parametrize("wire", sorted(SPEAKERS))
async def test_every_client_passes_over_signs_of_life(wire: str) -> None:
    """They come whenever nothing is shown for long, so also while a tool call grows."""
    limits = Limits(keepalive_s=0.001, stream_tokens=1)
    async with world(
        saying(TWO_CALLS, "cat a", "ca"), tools="hermes", template=THINKING, token_s=0.002, limits=limits
    ) as w:
        said = await SPEAKERS[wire](w, await w.session(), stream=True)
        assert said == [EXPECTED, ("", "cat a", [], "stop"), ("", "ca", [], "stop")]


def _check_history(w: World, turns: list[Turn]) -> None:
    """Each turn went on from the ids that were sampled, and the policy saw its own words."""
    assert [turn.fork for turn in turns] == ["", "", ""]
    assert [turn.parent for turn in turns] == ["", turns[0].turn_id, turns[1].turn_id]
    whole = paths(turns)
    for turn, seen in zip(turns, w.engines[0].requests, strict=True):
        assert whole[turn.turn_id][0] == seen.input_ids
    first = by_bytes(TWO_CALLS)
    prompt = w.engines[0].requests[2].input_ids
    assert any(prompt[i : i + len(first)] == first for i in range(len(prompt)))
    text = tokenizer().decode(prompt)
    assert "<|im_start|>system\nMend.<|im_end|>\n<|im_start|>user\ngo<|im_end|>" in text
    assert "<|im_start|>tool\nseen 0<|im_end|>\n<|im_start|>tool\nseen 1<|im_end|>" in text
    assert turns[0].reasoning == "hm" and len(json.loads(turns[0].tool_calls)) == 2


@pytest.mark.parametrize("stream", [True, False])
async def test_custom_and_namespace_tools_of_responses(stream: bool) -> None:
    said = (
        '<tool_call>{"name": "apply_patch", "arguments": {"input": "*** Begin"}}</tool_call>'
        '<tool_call>{"name": "multi__spawn", "arguments": {"id": "7"}}</tool_call>'
    )
    tools: Any = [
        {"type": "custom", "name": "apply_patch", "description": "patches", "format": {"type": "text"}},
        {"type": "namespace", "name": "multi", "tools": [{"type": "function", "name": "spawn", "parameters": SCHEMA}]},
    ]
    async with world(saying(said, "ca"), tools="hermes") as w:
        handle = await w.session()
        body = {"model": "m", "input": "go", "tools": tools, "stream": stream}
        if stream:
            url, key = f"{w.server.data_url}{handle.path}/v1/responses", {"Authorization": f"Bearer {handle.key}"}
            async with w.http.post(url, json=body, headers=key) as answer:
                lines = (await answer.text()).splitlines()
            output = json.loads(lines[-2].removeprefix("data: "))["response"]["output"]
            assert [line for line in lines if line.startswith("event: response.custom_tool_call_input.done")]
        else:
            output = (await w.post(handle, "v1/responses", body))[1]["output"]
        assert (output[0]["type"], output[0]["input"]) == ("custom_tool_call", "*** Begin")
        assert (output[1]["name"], output[1]["namespace"]) == ("spawn", "multi")
        results = [
            {"type": "custom_tool_call_output", "call_id": output[0]["call_id"], "output": "done"},
            {
                "type": "function_call_output",
                "call_id": output[1]["call_id"],
                "output": [{"type": "input_text", "text": "8"}],
            },
        ]
        again = {"model": "m", "tools": tools, "input": [{"role": "user", "content": "go"}, *output, *results]}
        assert (await w.post(handle, "v1/responses", again))[0] == 200
        assert [turn.fork for turn in await w.control.close(handle.session_id)] == ["", ""]


@pytest.mark.parametrize("arguments", [{"patch": "*** Begin"}, {"input": "x", "n": 1.0}, {"input": {"a": 1}}, {}])
async def test_a_custom_tool_called_with_other_arguments_comes_back_as_it_was_called(arguments: dict[str, Any]) -> None:
    said = f"<tool_call>{json.dumps({'name': 'apply_patch', 'arguments': arguments})}</tool_call>"
    tools = [{"type": "custom", "name": "apply_patch", "description": "patches", "format": {"type": "text"}}]
    async with world(saying(said, "ca"), tools="hermes") as w:
        handle = await w.session()
        _, answer = await w.post(handle, "v1/responses", {"model": "m", "input": "go", "tools": tools})
        (called,) = answer["output"]
        assert json.loads(called["input"]) == arguments
        result = {"type": "custom_tool_call_output", "call_id": called["call_id"], "output": "not a patch"}
        history = [{"role": "user", "content": "go"}, called, result]
        await w.post(handle, "v1/responses", {"model": "m", "input": history, "tools": tools})
        first, second = await w.control.close(handle.session_id)
        assert (second.fork, second.parent) == ("", first.turn_id)
        assert second.prefix_len > first.prefix_len + len(first.prompt_ids) // 4, "all that was sampled is kept"


GOOGLE: dict[str, Any] = {
    "systemInstruction": {"parts": [{"text": "Mend."}]},
    "contents": [
        {"role": "user", "parts": [{"text": "go"}]},
        {"role": "model", "parts": [{"functionCall": {"name": "bash", "args": {"topK": 1}}}]},
        {"role": "user", "parts": [{"functionResponse": {"name": "bash", "response": {"output": "seen"}}}]},
    ],
    "tools": [{"functionDeclarations": [{"name": "bash", "parametersJsonSchema": {"properties": {"topK": {}}}}]}],
    "toolConfig": {"functionCallingConfig": {"mode": "NONE"}},
    "generationConfig": {"maxOutputTokens": 7, "stopSequences": ["END"], "topK": 3},
}


def _own_names(value: Any) -> Any:
    """A request with the fields' own names, as JSON of protocol buffers also has them."""
    if isinstance(value, list):
        return [_own_names(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = ("args", "parametersJsonSchema")
    return {
        re.sub("[A-Z]", lambda found: "_" + found[0].lower(), key): part if key in kept else _own_names(part)
        for key, part in value.items()
    }


def test_google_s_fields_count_by_either_name() -> None:
    whole, own = GOOGLE, _own_names(GOOGLE)
    assert own["system_instruction"] and own["generation_config"]["max_output_tokens"] == 7
    target = "v1beta/models/m:generateContent"
    read = [GenerateContent().read(json.dumps(body).encode(), target) for body in (whole, own, {**own, **whole})]
    assert read[0] == read[1] == read[2]
    assert [message.role for message in read[0].messages] == ["system", "user", "assistant", "tool"]
    assert (read[0].max_tokens, read[0].stop, read[0].tools_allowed) == (7, ("END",), False)
    assert read[0].tools is not None and "topK" in json.dumps(read[0].tools)
    asked = json.dumps({"generate_content_request": own}).encode()
    assert GenerateContent().read(asked, "v1beta/models/m:countTokens").messages == read[0].messages


def test_a_model_s_name_may_hold_a_colon() -> None:
    call = GenerateContent().read(json.dumps(GOOGLE).encode(), "v1beta/models/qwen3:8b-small:streamGenerateContent")
    assert (call.model, call.stream, side_reason(call)) == ("qwen3:8b-small", True, "model")


async def test_results_of_tools_may_come_from_the_role_tool() -> None:
    async with world(saying("ls", "cat")) as w:
        handle = await w.session()
        called = google.Part.from_function_call(name="bash", args={})
        seen = google.Part.from_function_response(name="bash", response={"output": "seen"})
        contents: Any = [
            google.UserContent("go"),
            google.ModelContent([called]),
            google.Content(role="tool", parts=[seen]),
        ]
        answer = await w.google(handle).aio.models.generate_content(model="m", contents=contents)
        assert answer.text == "cat"
        assert "<|im_start|>tool\nseen<|im_end|>" in tokenizer().decode(w.engines[0].requests[0].input_ids)


async def test_tokens_are_counted_as_they_are_used() -> None:
    async with world(saying("ls")) as w:
        handle = await w.session()
        messages: Any = [{"role": "user", "content": "ls -la"}]
        client = w.anthropic(handle)
        counted = await client.messages.count_tokens(model="m", messages=messages, system="Mend.")
        answer = await client.messages.create(model="m", messages=messages, system="Mend.", max_tokens=9)
        assert counted.input_tokens == answer.usage.input_tokens == len(w.engines[0].requests[0].input_ids)
        total = await w.google(handle).aio.models.count_tokens(model="m", contents="ls -la")
        assert total.total_tokens == (await client.messages.count_tokens(model="m", messages=messages)).input_tokens
        assert len(await w.control.close(handle.session_id)) == 1


async def test_every_client_is_told_of_a_full_context_in_words_it_knows() -> None:
    async with world(saying("ls")) as w:
        handle = await w.session(Sampling(max_context=60))
        long: Any = [{"role": "user", "content": "x" * 100}]
        with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: 1\d\d tokens > 60 maximum"):
            await w.anthropic(handle).messages.create(model="m", max_tokens=9, messages=long)
        with pytest.raises(openai.BadRequestError, match="maximum context length is 60 tokens") as refused:
            await w.client(handle).responses.create(model="m", input="x" * 100)
        assert refused.value.code == "context_length_exceeded"
        with pytest.raises(google_errors.ClientError, match="exceeds the maximum number of tokens allowed"):
            await w.google(handle).aio.models.generate_content(model="m", contents="x" * 100)


async def test_stop_strings_and_cut_replies_are_told() -> None:
    async with world(saying("ls -la")) as w:
        handle = await w.session()
        client = w.anthropic(handle)
        cut = await client.messages.create(model="m", max_tokens=2, messages=[{"role": "user", "content": "go"}])
        assert (cut.stop_reason, cut.content[0].type) == ("max_tokens", "text")
        whole = await w.client(handle).responses.create(model="m", input="go", max_output_tokens=2)
        assert (whole.status, whole.incomplete_details and whole.incomplete_details.reason) == (
            "incomplete",
            "max_output_tokens",
        )
        short = await w.google(handle).aio.models.generate_content(
            model="m", contents="go", config=google.GenerateContentConfig(max_output_tokens=2)
        )
        assert short.candidates and short.candidates[0].finish_reason == google.FinishReason.MAX_TOKENS


async def test_models_are_listed_for_every_client() -> None:
    async with world(saying("ls")) as w:
        handle = await w.session()
        assert [model.id async for model in w.anthropic(handle).models.list()] == ["policy", "policy-small"]
        pages = await w.google(handle).aio.models.list()
        assert [model.name async for model in pages] == ["models/policy", "models/policy-small"]


async def test_a_wrong_key_is_an_authentication_error_for_every_client() -> None:
    async with world(saying("ls")) as w:
        mine, other = await w.session(), await w.session()
        w.anthropic(mine)
        stranger = anthropic.AsyncAnthropic(base_url=w.server.data_url + mine.path, api_key=other.key, max_retries=0)
        with pytest.raises(anthropic.AuthenticationError):
            await stranger.messages.create(model="m", max_tokens=9, messages=[{"role": "user", "content": "go"}])
        await stranger.close()
        foreign = f"{w.server.data_url}{mine.path}/v1beta/models/m:generateContent"
        async with w.http.post(foreign, json={"contents": []}, headers={"x-goog-api-key": other.key}) as answer:
            assert (answer.status, (await answer.json())["error"]["status"]) == (401, "UNAUTHENTICATED")
        assert w.engines[0].requests == []
