"""An agent's own log, in each format that is read, against the records of its calls."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kat_stream.env.scaffolds.own_log import differences
from topics import Turn

ARGUMENTS = {"command": "ls", "content": "no reply", "text": "none either"}
CODEX = [
    {"type": "session_meta", "payload": {"base_instructions": {"text": "Be brief."}}},
    {"type": "response_item", "payload": {"role": "user", "content": [{"type": "input_text", "text": "Mend it."}]}},
    {
        "type": "response_item",
        "payload": {"role": "assistant", "content": [{"type": "output_text", "text": "I look.\n"}]},
    },
    {
        "type": "response_item",
        "payload": {"type": "function_call", "name": "bash", "arguments": json.dumps(ARGUMENTS, indent=1)},
    },
]
CLAUDE = [
    {"type": "attachment", "attachment": {"type": "model", "text": "You are a model."}},
    {
        "type": "assistant",
        "message": {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, {"text": "I look."}]},
    },
    {
        "type": "assistant",
        "message": {"role": "assistant", "content": [{"type": "tool_use", "name": "bash", "input": ARGUMENTS}]},
    },
    {"type": "user", "message": {"role": "user", "content": [{"type": "tool_result", "content": "a.txt"}]}},
]
QWEN = [
    {
        "type": "assistant",
        "message": {
            "role": "model",
            "parts": [
                {"text": "hm", "thought": True},
                {"text": "I look."},
                {"functionCall": {"name": "bash", "args": ARGUMENTS}},
            ],
        },
    },
    {"type": "tool_result", "message": {"role": "user", "parts": [{"functionResponse": {"name": "bash"}}]}},
]
GEMINI = [
    {
        "messages": [
            {"type": "user", "content": "Mend it."},
            {"type": "gemini", "content": "I look.", "toolCalls": [{"name": "bash", "args": ARGUMENTS}]},
        ]
    }
]
MINI = [
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {
                "role": "assistant",
                "content": "I look.",
                "tool_calls": [{"function": {"name": "bash", "arguments": json.dumps(ARGUMENTS)}}],
            },
            {"role": "tool", "content": "a.txt"},
        ]
    }
]


def turn(content: str, *calls: tuple[str, dict[str, Any]], **other: Any) -> Turn:
    made = [{"id": "c", "name": name, "arguments": json.dumps(arguments)} for name, arguments in calls]
    known = {"run": "r", "group_id": "g", "rollout_id": "o", "session_id": "s", "turn_id": content, "index": 0}
    known |= {"prompt_ids": b"", "sampled_ids": b"", "logprobs": b"", "spans": (), "finish_reason": "stop"}
    return Turn(**known | other, content=content, tool_calls=json.dumps(made) if made else "")


def as_file(values: list[Any]) -> bytes:
    return b"\n".join(json.dumps(value).encode() for value in values) + b'\n{"cut\0'


@pytest.mark.parametrize("log", [CODEX, CLAUDE, QWEN, GEMINI, MINI], ids=["codex", "claude", "qwen", "gemini", "mini"])
def test_each_format_is_read(log: list[Any]) -> None:
    said = turn("I look.", ("bash", ARGUMENTS))
    side, lost = turn("A title", side="title"), turn("half a", finish_reason="abort")
    assert differences(as_file(log), [said, side, lost]) == []
    other = turn("I look.", ("bash", {"command": "rm"}))
    lacks, has = differences(as_file(log), [other])
    assert lacks.startswith('the agent\'s own log lacks \'bash {"command":"rm') and "own log has 'bash" in has
    assert differences(as_file(log), [said, turn("More.")]) == ["the agent's own log lacks 'More.'"]
    assert len(differences(as_file(log), [])) == 2


def test_a_log_that_holds_nothing_is_told() -> None:
    assert "holds nothing" in differences(b"", [turn("I look.")])[0]
