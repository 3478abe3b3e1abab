"""Conversations read back from recorded ids: equal to what was asked and said, whatever template and dialect."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kat_stream.env.manager import Policy, Rules, apply_rules, rollout_of
from kat_stream.env.manager.sft import FORMAT
from kat_stream.errors import DataError
from kat_stream.gateway.dialects.anthropic import AnthropicMessages
from kat_stream.gateway.messages import Message, ToolCall
from kat_stream.gateway.render import Renderer
from tests.contract.gateway_kit import CHATML, FORGETFUL, THINKING, tokenizer
from tests.unit.records import request, trajectory, turn
from topics import Trajectory, Turn
from topics.record import ints

# As Qwen2.5: tools inside the instructions, results of tools as a user's, those of one reply together.
QWEN = (
    "{%- if tools %}<|im_start|>system\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% else %}You help.{% endif %}"
    "\n\n# Tools\n\n<tools>{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n</tools>\n\n"
    'Answer {"name": <function-name>, "arguments": <args-json-object>}<|im_end|>\n'
    "{% elif messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{% endif %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'user' or m.role == 'assistant' %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{%- for call in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{%- endfor %}<|im_end|>\n"
    "{%- elif m.role == 'tool' %}"
    "{%- if messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "\n<tool_response>\n{{ m.content }}\n</tool_response>"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
    "{%- endif %}{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOL = {
    "type": "function",
    "function": {
        "name": "run",
        "description": "Run {a command}.",
        "parameters": {"type": "object", "properties": {"command": {"type": "string"}}},
    },
}
ASKED = request()


def call(number: int, command: str) -> ToolCall:
    return ToolCall(f"call{number}", "run", json.dumps({"command": command}))


CONVERSATION = (
    Message(role="system", content="Mend {the} repository."),
    Message(role="user", content="a failing test\n<tools> are there"),
    Message(role="assistant", content="look", tool_calls=(call(0, "ls"), call(1, 'cat "a b"'))),
    Message(role="tool", content="a.py\nb.py", tool_call_id="call0", name="run"),
    Message(role="tool", content="[exit 1]", tool_call_id="call1", name="run"),
    Message(role="assistant", content="", tool_calls=(call(2, "sed -i s/a/b/ a.py"),)),
    Message(role="tool", content="[exit 0]", tool_call_id="call2", name="run"),
    Message(role="assistant", content="done"),
)


def saved(template: str, directory: Path) -> str:
    """A model directory with this template."""
    made = tokenizer(template)
    made.save_pretrained(directory)
    (directory / "config.json").write_text('{"model_type": "qwen2"}')
    return str(directory)


def recorded(renderer: Renderer, messages: tuple[Message, ...], tools: list[dict[str, Any]] | None) -> Trajectory:
    """The conversation as a session records it: each reply a turn that extends the one before."""
    shown = [message.for_template() for message in messages]
    turns: list[Turn] = []
    path: list[int] = []
    for at, message in enumerate(messages):
        if message.role != "assistant":
            continue
        prompt = list(ints(renderer.encode(renderer.text(shown[:at], tools))))
        whole = list(ints(renderer.encode(renderer.text(shown[: at + 1], tools, ask=False))))
        assert prompt[: len(path)] == path and whole[: len(prompt)] == prompt
        stop = len(whole) - whole[::-1].index(renderer._backend.token_to_id("<|im_end|>"))
        turns.append(said(message, len(turns), prompt[len(path) :], whole[len(prompt) : stop], len(path)))
        path = whole[:stop]
    return trajectory(ASKED, *turns)


def said(message: Message, number: int, prompt: list[int], sampled: list[int], prefix: int) -> Turn:
    return turn(
        ASKED,
        prompt,
        sampled,
        name=f"t{number}",
        index=number,
        parent=f"t{number - 1}" if number else "",
        prefix_len=prefix,
        content=message.content,
        tool_calls=msgspec.json.encode(message.tool_calls).decode() if message.tool_calls else "",
        reasoning=message.reasoning,
    )


@pytest.mark.parametrize("template", [CHATML, QWEN], ids=["tools apart", "tools inside"])
@pytest.mark.parametrize("with_system", [True, False])
@pytest.mark.parametrize("tools", [[TOOL], None], ids=["tools", "none"])
def test_a_conversation_comes_back_as_it_was(
    template: str, with_system: bool, tools: list[dict[str, Any]] | None, tmp_path: Path
) -> None:
    policy = Policy(saved(template, tmp_path))
    conversation = CONVERSATION if with_system else CONVERSATION[1:]
    (row,) = FORMAT.rows(rollout_of(recorded(policy.renderer, conversation, tools), 1.0), policy)
    assert row["messages"] == [message.for_template() for message in conversation]
    assert row["tools"] == tools
    assert row["exact"] is True and row["learned"] == ["t0", "t1", "t2"]


def test_reasoning_is_taken_from_the_record(tmp_path: Path) -> None:
    policy = Policy(saved(THINKING, tmp_path))
    thought = Message(role="assistant", content="yes", reasoning="is it?")
    conversation = (
        CONVERSATION[1],
        thought,
        Message(role="user", content="sure?"),
        Message(role="assistant", content="y"),
    )
    (row,) = FORMAT.rows(rollout_of(recorded(policy.renderer, conversation, None), 1.0), policy)
    assert row["messages"][1] == {"role": "assistant", "content": "yes", "reasoning_content": "is it?"}
    assert row["exact"] is True


def test_a_history_that_was_told_differently_is_read_from_its_text(tmp_path: Path) -> None:
    """A template that drops what was thought: the second prompt is no extension of the first reply."""
    policy = Policy(saved(FORGETFUL, tmp_path))
    renderer = policy.renderer
    asked = {"role": "user", "content": "go"}
    echo = Message(role="assistant", content="look", tool_calls=(call(0, "ls"),))
    first = list(ints(renderer.encode(renderer.text([asked], None))))
    thinking = list(ints(renderer.encode("<think>hm</think>look<|im_end|>")))
    second = list(ints(renderer.encode(renderer.text([asked, echo.for_template(), asked], None))))
    turns = [
        said(Message(role="assistant", content="look", reasoning="hm"), 0, first, thinking, 0),
        said(Message(role="assistant", content="x"), 1, second[len(first) :], second[:1], len(first)),
    ]
    one, two = FORMAT.rows(rollout_of(trajectory(ASKED, *turns), 1.0), policy)
    assert one["messages"] == [asked, {"role": "assistant", "content": "look", "reasoning_content": "hm"}]
    told = two["messages"][1]
    assert (told["content"].strip(), told["tool_calls"][0]["function"]) == (
        "look",
        {"name": "run", "arguments": {"command": "ls"}},
    )
    assert [m["role"] for m in two["messages"]] == ["user", "assistant", "user", "assistant"]
    assert (one["learned"], two["learned"]) == (["t0"], ["t1"])


def test_an_exchange_that_failed_is_not_told(tmp_path: Path) -> None:
    policy = Policy(saved(QWEN, tmp_path))
    made = rollout_of(recorded(policy.renderer, CONVERSATION, [TOOL]), 1.0)
    (row,) = FORMAT.rows(apply_rules(made, Rules(failed=re.compile(r"\[exit [1-9]")), policy.decode), policy)
    assert row["messages"] == [m.for_template() for m in (*CONVERSATION[:2], *CONVERSATION[5:])]
    assert row["learned"] == ["t1", "t2"] and row["exact"] is False


def test_anthropic_blocks_become_openai_messages(tmp_path: Path) -> None:
    """What an agent asks in Anthropic's dialect, through the policy's ids, comes out in OpenAI's form."""
    policy = Policy(saved(QWEN, tmp_path))
    body = {
        "model": "m",
        "max_tokens": 9,
        "system": [{"type": "text", "text": "Mend.", "cache_control": {"type": "ephemeral"}}],
        "tools": [{"name": "run", "description": "r", "input_schema": {"type": "object", "properties": {}}}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "go"}]},
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "id": "toolu_1", "name": "run", "input": {"a": [1]}}],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "a.py"}]},
        ],
    }
    asked = AnthropicMessages().read(json.dumps(body).encode(), "/v1/messages")
    conversation = (*asked.messages, Message(role="assistant", content="done"))
    (row,) = FORMAT.rows(rollout_of(recorded(policy.renderer, conversation, asked.tools), 1.0), policy)
    called = row["messages"][2]["tool_calls"][0]
    assert called == {"id": "toolu_1", "type": "function", "function": {"name": "run", "arguments": {"a": [1]}}}
    assert row["messages"][3] == {"role": "tool", "content": "a.py", "tool_call_id": "toolu_1", "name": "run"}
    assert [m["role"] for m in row["messages"]] == ["system", "user", "assistant", "tool", "assistant"]
    assert row["tools"] == [
        {
            "type": "function",
            "function": {"name": "run", "description": "r", "parameters": {"type": "object", "properties": {}}},
        }
    ]
    assert row["exact"] is True


def test_ids_that_are_no_messages_are_refused(tmp_path: Path) -> None:
    policy = Policy(saved(CHATML, tmp_path))
    prompt = list(ints(policy.renderer.encode("once upon a time")))
    made = rollout_of(trajectory(ASKED, said(Message(role="assistant", content="x"), 0, prompt, prompt[:1], 0)), 1.0)
    with pytest.raises(DataError, match="writes no message like 'once upon"):
        list(FORMAT.rows(made, policy))


def test_a_reply_may_go_on_where_another_stopped(tmp_path: Path) -> None:
    """Nothing new in the prompt: no message stands between the two."""
    policy = Policy(saved(CHATML, tmp_path))
    prompt = list(ints(policy.renderer.encode(policy.renderer.text([{"role": "user", "content": "go"}], None))))
    turns = [
        said(Message(role="assistant", content="a"), 0, prompt, prompt[-1:], 0),
        said(Message(role="assistant", content="b"), 1, [], prompt[-1:], len(prompt) + 1),
    ]
    (row,) = FORMAT.rows(rollout_of(trajectory(ASKED, *turns), 1.0), policy)
    assert [(m["role"], m["content"]) for m in row["messages"]] == [
        ("user", "go"),
        ("assistant", "a"),
        ("assistant", "b"),
    ]
    assert row["learned"] == ["t0", "t1"] and row["exact"] is False


@pytest.mark.parametrize("calls", ["{", "[1]", '[{"id": 1}]'])
def test_calls_that_are_none_are_refused_with_the_turn(calls: str, tmp_path: Path) -> None:
    policy = Policy(saved(CHATML, tmp_path))
    made = recorded(policy.renderer, CONVERSATION, None)
    broken = msgspec.structs.replace(made, turns=(msgspec.structs.replace(made.turns[0], tool_calls=calls),))
    with pytest.raises(DataError, match="turn t0: tool_calls: "):
        list(FORMAT.rows(rollout_of(broken, 1.0), policy))
