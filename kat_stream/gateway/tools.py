"""What a reply says: reasoning, content and tool calls; and which family's parsers read a policy.

Owns the registry of parsers. Invariant: ids of tool calls follow from the turn and consist of letters and digits only,
as agents rewrite others; what the policy itself called a call goes beside them, for its template.
"""

from __future__ import annotations

from dataclasses import dataclass

from kat_stream.errors import ConfigError
from kat_stream.gateway.messages import ToolCall
from kat_stream.gateway.parsers import deepseek, glm, hermes, kimi, llama3, qwen3_coder, reasoning
from kat_stream.gateway.parsers.base import Parsed, ToolParser, Tools

AUTO = "auto"


def _none(text: str, _tools: Tools | None = None) -> Parsed:
    return text, []


NONE = ToolParser((), _none)
PARSERS: dict[str, ToolParser] = {
    "none": NONE,
    "hermes": hermes.PARSER,
    "qwen3-coder": qwen3_coder.PARSER,
    "llama3": llama3.PARSER,
    "deepseek": deepseek.PARSER,
    "glm": glm.PARSER,
    "kimi": kimi.PARSER,
}
# What a chat template that teaches or shows a family's calls contains; the first that is found decides.
_SIGNS = (
    ("<function=", "qwen3-coder"),
    ("<arg_key>", "glm"),
    ("<|tool_calls_section_begin|>", "kimi"),
    ("<｜tool▁calls▁begin｜>", "deepseek"),
    ("<tool_call>", "hermes"),
    ("<|python_tag|>", "llama3"),
    ('"parameters": ', "llama3"),
)


@dataclass(frozen=True, slots=True)
class Said:
    """A reply read: `ill_formed` if a tool call was begun that does not parse; it stays in the content."""

    reasoning: str
    content: str
    tool_calls: tuple[ToolCall, ...]
    ill_formed: bool


def get_parser(name: str) -> ToolParser:
    """The parser of this name; ConfigError names those there are."""
    if name not in PARSERS:
        raise ConfigError(f"gateway.tools: no parser {name!r}; there are: {AUTO}, {', '.join(sorted(PARSERS))}")
    return PARSERS[name]


def family(template: str) -> str:
    """The name of the parser for a chat template; `none` if it shows no tool calls."""
    return next((name for sign, name in _SIGNS if sign in template), "none")


def read_reply(
    parser: ToolParser,
    text: str,
    turn_id: str,
    *,
    tools: Tools | None = None,
    opened: bool = False,
    thinks: bool = False,
) -> Said:
    """A whole reply. `thinks`: the policy reasons before it speaks; `opened`: in this reply the template began it."""
    thought = reasoning.split(text, opened=opened) if thinks else reasoning.Thought("", text, True)
    content, calls = parser.parse(thought.content, tools)
    begun = parser.begins(thought.content if thought.closed else thought.reasoning)
    named = tuple(
        ToolCall(f"call{turn_id[:20]}{i}", call.name, call.arguments, call.said) for i, call in enumerate(calls)
    )
    return Said(thought.reasoning, content, named, begun and not calls)
