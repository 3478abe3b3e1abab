"""Our reading of replies against that of `renderers` (tests/oracles): the same, or docs/gateway.md says why not."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from kat_stream.gateway.tools import Said, get_parser, read_reply

RECORDED = json.loads((Path(__file__).parents[1] / "oracles" / "parsers.json").read_text())
Calls = list[tuple[str, Any]]
FOUND = {
    ("deepseek", "nothing of a broken reply is a call"): 6,
    ("deepseek", "same"): 44,
    ("glm", "a call in reasoning that nobody closed"): 3,
    ("glm", "nothing of a broken reply is a call"): 5,
    ("glm", "same"): 30,
    ("glm", "spaces of an argument"): 11,
    ("glm", "words for a number"): 1,
    ("hermes", "a call in reasoning that nobody closed"): 4,
    ("hermes", "nothing of a broken reply is a call"): 3,
    ("hermes", "same"): 38,
    ("hermes", "words behind calls"): 5,
    ("kimi", "a call in reasoning that nobody closed"): 6,
    ("kimi", "nothing of a broken reply is a call"): 9,
    ("kimi", "same"): 35,
    ("llama3", "same"): 50,
    ("qwen3-coder", "a call in reasoning that nobody closed"): 6,
    ("qwen3-coder", "nothing of a broken reply is a call"): 6,
    ("qwen3-coder", "same"): 28,
    ("qwen3-coder", "spaces of an argument"): 4,
    ("qwen3-coder", "spaces of an argument, words behind calls"): 2,
    ("qwen3-coder", "words behind calls"): 4,
}


def ours(reply: dict[str, Any]) -> Said:
    thinks = reply["family"] != "llama3"
    return read_reply(
        get_parser(reply["family"]),
        reply["text"],
        "t",
        tools=RECORDED["tools"],
        thinks=thinks,
        opened=reply["opened"],
    )


def stripped(calls: Calls) -> Calls:
    return [
        (name, {key: part.strip() if isinstance(part, str) else part for key, part in value.items()})
        for name, value in calls
    ]


def differences(said: Said, theirs: dict[str, Any], text: str) -> list[str]:
    """In what the two differ, apart from white space around a whole text; fails for what has no name here."""
    calls = [(call.name, call.value()) for call in said.tool_calls]
    whole = [(call["name"], call["arguments"]) for call in theirs["calls"]]
    content, thought = said.content.strip(), said.reasoning.strip()
    same = calls == whole and content == theirs["content"].strip() and thought == theirs["reasoning"].strip()
    if said.ill_formed and not same:
        if whole and theirs["reasoning"] and not content:
            assert thought.startswith(theirs["reasoning"].strip()) and text.strip().endswith(thought)
            return ["a call in reasoning that nobody closed"]
        assert not calls and text.strip().endswith(content) and content.startswith(theirs["content"].strip())
        return ["nothing of a broken reply is a call"]
    assert thought == theirs["reasoning"].strip()
    found = []
    if calls != whole:
        assert stripped(calls) == stripped(whole)
        found.append("spaces of an argument")
    if any(call["status"] != "ok" for call in theirs["calls"]):
        found.append("words for a number")
    if content != theirs["content"].strip():
        assert content.startswith(theirs["content"].strip()) and text.endswith(content.splitlines()[-1])
        found.append("words behind calls")
    return found


def test_replies_are_read_as_renderers_does_or_differ_by_name() -> None:
    seen: Counter[tuple[str, str]] = Counter()
    for reply in RECORDED["replies"]:
        found = differences(ours(reply), reply["theirs"], reply["text"])
        seen[reply["family"], ", ".join(found) or "same"] += 1
    assert seen == FOUND
