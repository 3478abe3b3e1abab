"""An agent's own log, in each format that is read, against the records of its calls."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kat_stream.env.sandboxes.files import pack
from kat_stream.env.scaffolds.description import read_description
from kat_stream.env.scaffolds.own_log import differences
from kat_stream.env.scaffolds.registry import described
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
CLINE = [
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Mend it."}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "I look."},
                    {"type": "tool_use", "name": "bash", "input": ARGUMENTS},
                ],
            },
            {"role": "user", "content": [{"type": "tool_result", "name": "bash", "content": [{"result": "a.txt"}]}]},
        ],
        "system_prompt": "Be brief.",
    }
]
OPENHANDS = [
    {"source": "agent", "system_prompt": {"type": "text", "text": "Be brief."}},
    {"source": "user", "llm_message": {"role": "user", "content": [{"type": "text", "text": "Mend it."}]}},
    {
        "source": "agent",
        "thought": [{"type": "text", "text": "I look."}],
        "action": {**ARGUMENTS, "kind": "TerminalAction"},
        "tool_call": {"name": "bash", "arguments": json.dumps(ARGUMENTS)},
    },
    {"source": "environment", "observation": {"content": [{"type": "text", "text": "a.txt"}]}},
]
OPENCODE = """
CREATE TABLE message (id, data);
CREATE TABLE part (message_id, data);
INSERT INTO message VALUES (1, '{"role": "user"}'), (2, '{"role": "assistant"}');
INSERT INTO part VALUES
    (1, '{"type": "text", "text": "Mend it."}'),
    (2, '{"type": "reasoning", "text": "hm"}'),
    (2, '{"type": "text", "text": "I look."}'),
    (2, '{"type": "tool", "tool": "bash", "state": {"input": ARGUMENTS, "output": "a.txt", "title": "list"}}');
"""
OPENCLAW = """
CREATE TABLE transcript_events (event_json);
INSERT INTO transcript_events VALUES
    (NULL),
    ('{"type": "message", "message": {"role": "user", "content": "Mend it."}}'),
    ('{"type": "message", "message": {"role": "assistant", "content": [
        {"type": "text", "text": "I look."}, {"type": "toolCall", "name": "bash", "arguments": ARGUMENTS}]}}'),
    ('{"type": "message", "message": {"role": "toolResult", "content": [{"type": "text", "text": "a.txt"}]}}');
"""
AIDER = b"""TO LLM 2026-11-29T23:24:32
-------
SYSTEM Be brief.
-------
USER LLM RESPONSE 2026-11-29T23:24:33
USER ASSISTANT no reply
LLM RESPONSE 2026-11-29T23:24:33
ASSISTANT a.txt
ASSISTANT\x20
ASSISTANT >>>>>>> REPLACE
TO LLM 2026-11-29T23:24:34
-------
ASSISTANT no reply either
LLM RESPONSE 2026-11-29T23:24:34

"""


def turn(content: str, *calls: tuple[str, dict[str, Any]], **other: Any) -> Turn:
    made = [{"id": "c", "name": name, "arguments": json.dumps(arguments)} for name, arguments in calls]
    known = {"run": "r", "group_id": "g", "rollout_id": "o", "session_id": "s", "turn_id": content, "index": 0}
    known |= {"prompt_ids": b"", "sampled_ids": b"", "logprobs": b"", "spans": (), "finish_reason": "stop"}
    return Turn(**known | other, content=content, tool_calls=json.dumps(made) if made else "")


def as_log(values: list[Any]) -> bytes:
    lines = b"\n".join(json.dumps(value).encode() for value in values)
    return pack({"session.jsonl": (lines + b'\n{"cut', 0o644)})


FORMATS = {
    "codex": CODEX,
    "claude": CLAUDE,
    "qwen": QWEN,
    "gemini": GEMINI,
    "mini": MINI,
    "cline": CLINE,
    "openhands": OPENHANDS,
}


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_read(name: str) -> None:
    assert_tells(as_log(FORMATS[name]))


@pytest.mark.parametrize(("name", "script"), [("opencode", OPENCODE), ("kilo-code", OPENCODE), ("openclaw", OPENCLAW)])
def test_a_database_is_read_by_the_agents_query(name: str, script: str, tmp_path: Path) -> None:
    query = read_description(described()[name]).check.own_log_query
    with closing(sqlite3.connect(tmp_path / "log.db", isolation_level=None)) as database:
        # As an agent leaves it that was killed: the rows are not yet in the database itself.
        database.execute("PRAGMA journal_mode = WAL")
        database.executescript(script.replace("ARGUMENTS", json.dumps(ARGUMENTS)))
        files = {path.name: (path.read_bytes(), 0o644) for path in tmp_path.iterdir()}
    assert "log.db-wal" in files
    assert_tells(pack(files), query)
    del files["log.db"]
    assert "cannot be read" in differences(pack(files), [], query)[0]


def assert_tells(log: bytes, query: str = "") -> None:
    """The log has what is in all samples, and whatever differs from it is told."""
    said = turn("I look.", ("bash", ARGUMENTS))
    side, lost = turn("A title", side="title"), turn("half a", finish_reason="abort")
    assert differences(log, [said, side, lost], query) == []
    other = turn("I look.", ("bash", {"command": "rm"}))
    lacks, has = differences(log, [other], query)
    assert lacks.startswith('the agent\'s own log lacks \'bash {"command":"rm') and "own log has 'bash" in has
    assert differences(log, [said, turn("More.")], query) == ["the agent's own log lacks 'More.'"]
    assert len(differences(log, [], query)) == 2


def test_aiders_text_is_read() -> None:
    log = pack({"llm.history": (AIDER, 0o644)})
    assert differences(log, [turn("a.txt\n\n>>>>>>> REPLACE")]) == []
    lacks, has = differences(log, [turn("b.txt\n\n>>>>>>> REPLACE")])
    assert "lacks 'b.txt" in lacks and "has 'a.txt" in has


@pytest.mark.parametrize("query", ["", "SELECT 1"])
def test_a_log_that_holds_nothing_is_told(query: str) -> None:
    assert "holds nothing" in differences(b"", [turn("I look.")], query)[0]
