"""Other people's reading of generated replies, which ours is compared with: writes `parsers.json` beside this file.

    uv pip install renderers==0.1.12 httpx      (an environment of its own)
    python tests/oracles/make_parsers.py

Replies are as the families' templates write them: words, reasoning, calls of two tools, some of them cut or broken.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

OUT = Path(__file__).with_name("parsers.json")
EACH = 50
"""Replies of a family."""
WORDS = ("I look.", "größer 😀", "a < b", "x = {'a': 1}", "two\n\nlines", " padded ", '"quoted"', "1", "true", "[1, 2]")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"command": {"type": "string"}, "lines": {"type": "integer"}, "more": {"type": "object"}},
            },
        },
    }
    for name in ("bash", "edit-file")
]
SPECIAL = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "qwen3-coder": ("<tool_call>", "</tool_call>", "<think>", "</think>"),
    "glm": (
        "<tool_call>", "</tool_call>", "<think>", "</think>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>",
    ),
    "deepseek": (
        "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>",
        "<｜tool▁sep｜>",
    ),
    "kimi": (
        "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>",
        "<|tool_call_argument_begin|>", "<|tool_call_end|>",
    ),
    "llama3": (),
}  # fmt: skip
Call = tuple[str, dict[str, Any]]


class Letters:
    """A tokenizer of single characters and a family's special tokens."""

    unk_token_id = None

    def __init__(self, special: tuple[str, ...]) -> None:
        self.special = special

    def convert_tokens_to_ids(self, token: str) -> int | None:
        return self.special.index(token) if token in self.special else None

    def encode(self, text: str, **_: Any) -> list[int]:
        ids, at = [], 0
        while at < len(text):
            token = next((token for token in self.special if text.startswith(token, at)), text[at])
            ids.append(self.special.index(token) if token in self.special else 100 + ord(token))
            at += len(token)
        return ids

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(self.special[i] if i < 100 else chr(i - 100) for i in ids)


def as_json(arguments: dict[str, Any]) -> str:
    return json.dumps(arguments, ensure_ascii=False)


def bare(value: Any) -> str:
    return value if isinstance(value, str) else as_json(value)


def written(family: str, calls: list[Call]) -> str:
    """Calls as the family's template writes them."""
    if family == "hermes":
        return "\n".join(
            f'<tool_call>\n{{"name": "{name}", "arguments": {as_json(value)}}}\n</tool_call>' for name, value in calls
        )
    if family == "llama3":
        return "".join(f'{{"name": "{name}", "parameters": {as_json(value)}}}' for name, value in calls[:1])
    if family == "qwen3-coder":
        return "\n".join(
            f"<tool_call>\n<function={name}>\n"
            + "".join(f"<parameter={key}>\n{bare(part)}\n</parameter>\n" for key, part in value.items())
            + "</function>\n</tool_call>"
            for name, value in calls
        )
    if family == "glm":
        return "\n".join(
            f"<tool_call>{name}\n"
            + "".join(f"<arg_key>{key}</arg_key>\n<arg_value>{bare(part)}</arg_value>\n" for key, part in value.items())
            + "</tool_call>"
            for name, value in calls
        )
    section, _, begin, end, middle = SPECIAL["deepseek"]
    if family == "deepseek":
        made = (f"{begin}function{middle}{name}\n```json\n{as_json(value)}\n```{end}" for name, value in calls)
        return section + "\n".join(made) + SPECIAL["deepseek"][1]
    section, close, begin, middle, end = SPECIAL["kimi"]
    made = (f"{begin}functions.{name}:{i}{middle}{as_json(value)}{end}" for i, (name, value) in enumerate(calls))
    return section + "".join(made) + close


def reply(family: str, chance: random.Random) -> tuple[str, bool]:
    """A reply, and whether the prompt had opened its reasoning."""
    calls = [(chance.choice(("bash", "edit-file")), arguments(chance)) for _ in range(chance.choice((0, 1, 1, 2, 3)))]
    alone = family == "llama3" and calls
    said = "" if alone or calls and chance.random() < 0.4 else " ".join(chance.choices(WORDS, k=2))
    gap = chance.choice(("", "\n", "\n\n")) if said and calls else ""
    text = said + gap + (written(family, calls) if calls else "")
    if family != "llama3" and chance.random() < 0.05:
        return "<think>\nhm\n" + written(family, [("bash", {"command": "ls"})]), False
    opened = family != "llama3" and chance.random() < 0.3
    if opened or (family != "llama3" and chance.random() < 0.3):
        thought = "\n" + " ".join(chance.choices(WORDS, k=2)) + "\n"
        text = ("" if opened else "<think>") + thought + "</think>\n\n" + text
    return damaged(text, chance) if chance.random() < 0.3 else text, opened


def damaged(text: str, chance: random.Random) -> str:
    """Cut, lengthened, or with a piece left out."""
    at = chance.randrange(len(text))
    how = chance.randrange(3)
    if how == 0:
        return text[:at]
    return text + "\nDone." if how == 1 else text[:at] + text[at + chance.randint(1, 9) :]


def arguments(chance: random.Random) -> dict[str, Any]:
    value: dict[str, Any] = {"command": " ".join(chance.choices(WORDS, k=chance.randint(1, 3)))}
    if chance.random() < 0.5:
        value["lines"] = chance.randint(0, 99)
    if chance.random() < 0.3:
        value["more"] = {"list": [1, None, "ü"], "deep": {"a": 0.5}}
    return value


def read(family: str, text: str, opened: bool) -> dict[str, Any]:
    """What `renderers` reads in it."""
    from renderers import parsing

    letters = Letters(SPECIAL[family])
    ids, number = letters.encode(text), letters.convert_tokens_to_ids
    more: dict[str, Any] = {"stop_ids": set()}
    if family != "llama3":
        more["prefilled_thinking"] = opened
    if family in ("hermes", "qwen3-coder", "glm"):
        more |= {"tool_call_id": number("<tool_call>"), "tool_call_end_id": number("</tool_call>")}
    if family in ("qwen3-coder", "glm"):
        more |= {"think_id": number("<think>"), "think_end_id": number("</think>"), "tools": TOOLS}
    if family == "glm":
        more |= {
            f"{name}_{side}id": number(f"<{'/' if side else ''}{name}>")
            for name in ("arg_key", "arg_value")
            for side in ("", "end_")
        }
    if family == "deepseek":
        names = ("tool_calls_begin_id", "tool_calls_end_id", "tool_call_begin_id", "tool_call_end_id", "tool_sep_id")
        more |= dict(zip(names, range(5), strict=True))
    if family == "kimi":
        names = ("section_begin", "section_end")
        more |= {f"tool_calls_{name}_id": i for i, name in enumerate(names)}
        more |= {"tool_call_begin_id": 2, "tool_call_argument_begin_id": 3, "tool_call_end_id": 4}
    how = {
        "hermes": parsing.parse_qwen3, "qwen3-coder": parsing.parse_qwen35, "glm": parsing.parse_glm,
        "deepseek": parsing.parse_deepseek_v3, "kimi": parsing.parse_kimi_k2, "llama3": parsing.parse_llama_3,
    }[family]  # fmt: skip
    found = how(letters, ids, **more)
    calls = [{"name": call.name, "arguments": call.arguments, "status": call.status.value} for call in found.tool_calls]
    return {"reasoning": found.reasoning_content or "", "content": found.content, "calls": calls}


def main() -> None:
    made = []
    for family in SPECIAL:
        for i in range(EACH):
            text, opened = reply(family, random.Random(f"{family}/{i}"))
            made.append({"family": family, "text": text, "opened": opened, "theirs": read(family, text, opened)})
    OUT.write_text(json.dumps({"tools": TOOLS, "replies": made}, ensure_ascii=False, indent=0) + "\n")


if __name__ == "__main__":
    main()
