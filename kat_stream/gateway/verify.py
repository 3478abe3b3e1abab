"""Proof for a model directory: what the gateway puts before the policy is what the model's own template would.

Owns generated conversations and the comparison. Invariant: a conversation is judged only by the template itself:
replies are its own text for an assistant's message, and prompts are compared with its text for all messages, except
that a reply may stand as it was sampled where the template would write it another way.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from kat_stream.errors import RequestRefused
from kat_stream.gateway.ids import unpack
from kat_stream.gateway.messages import Message, ModelCall, Reply, ToolCall
from kat_stream.gateway.parsers.base import ToolParser
from kat_stream.gateway.prompts import Conversation, Prompt, under
from kat_stream.gateway.render import Renderer
from kat_stream.gateway.text import text_digest
from kat_stream.gateway.tools import Said, family, get_parser, read_reply

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_WORDS = (
    "ls -la",
    "It is gone.",
    "x = {'a': 1}",
    "größer 😀",
    "if a < b:\n    return",
    '"quoted"',
    "a\n\nb",
    "1",
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"{name} something",
            "parameters": {
                "type": "object",
                "properties": {"command": {"type": "string"}, "lines": {"type": "integer"}},
                "required": ["command"],
            },
        },
    }
    for name in ("bash", "edit")
]


_LONG_EACH = 10
"""One conversation of so many is long."""


@dataclass(slots=True)
class Report:
    """Turns by what became of them; `wrong` says where template and gateway disagree."""

    family: str
    thinks: bool
    shape: str
    turns: int = 0
    extended: int = 0
    """Prompts that go on behind the sampled ids."""
    kept: int = 0
    """Of those, prompts in which a reply stands as it was sampled and the template would write it another way."""
    shortened: int = 0
    """Of those, prompts whose end was seen on a shortened history."""
    forks: Counter[str] = field(default_factory=Counter)
    calls: int = 0
    """Tool calls that were read back from the template's text of them."""
    unwritable: int = 0
    """Conversations that the template refuses."""
    wrong: list[str] = field(default_factory=list)


def verify(tokenizer: PreTrainedTokenizerFast, *, conversations: int, seed: int = 0) -> Report:
    """Generate conversations and compare. ConfigError: a template that shows no assistant."""
    renderer = Renderer(tokenizer)
    name = family(renderer.template)
    report = Report(name, renderer.thinks, repr(renderer.shape))
    for number in range(conversations):
        _Trial(renderer, get_parser(name), report, random.Random(f"{seed}/{number}"), number).run()
    return report


class _Trial:
    """One conversation, turn by turn."""

    def __init__(
        self, renderer: Renderer, parser: ToolParser, report: Report, chance: random.Random, number: int
    ) -> None:
        self._renderer, self._parser, self._report, self._chance, self._number = (
            renderer,
            parser,
            report,
            chance,
            number,
        )
        self._conversation = Conversation()
        self._tools = TOOLS if report.family != "none" and chance.random() < 0.7 else None
        head = [Message(role="system", content=self._words())] if chance.random() < 0.7 else []
        self._messages = [*head, Message(role="user", content=self._words())]

    def run(self) -> None:
        long = self._number % _LONG_EACH == 0
        for turn in range(self._chance.randint(10, 20) if long else self._chance.randint(2, 5)):
            call = ModelCall(dialect="verify", messages=tuple(self._messages), tools=self._tools)
            try:
                prompt = self._conversation.prompt(self._renderer, call)
            except RequestRefused:
                self._report.unwritable += 1
                return
            self._compare(prompt, turn)
            if not self._answer(prompt, f"{self._number}x{turn}"):
                return

    def _compare(self, prompt: Prompt, turn: int) -> None:
        """Whether the prompt is the template's text of the conversation as it was said."""
        self._report.turns += 1
        self._report.extended += prompt.appends
        self._report.shortened += prompt.heard is not None and prompt.heard.rendered < prompt.messages
        if prompt.fork:
            self._report.forks[prompt.fork] += 1
        shown = self._renderer.decode(unpack(prompt.ids))
        asked = self._renderer.text([message.for_template() for message in self._told()], self._tools)
        if prompt.text.digest != text_digest(asked):
            self._report.wrong.append(f"conversation {self._number}, turn {turn}: the text seen is not the template's")
        if shown == asked:
            return
        said = prompt.said
        behind = shown[len(self._renderer.decode(unpack(said.node.path()))) :] if said and prompt.appends else ""
        if behind and asked.endswith(behind):
            # All before that reply was compared when it was asked for; the reply itself is the policy's.
            self._report.kept += 1
        else:
            self._report.wrong.append(f"conversation {self._number}, turn {turn}: {_difference(shown, asked)}")

    def _told(self) -> list[Message]:
        """The messages as the template is to get them: results under the policy's own ids of their calls."""
        ids = {call.id: call.shown_id for message in self._messages for call in message.tool_calls}
        return [under(ids, message) for message in self._messages]

    def _answer(self, prompt: Prompt, turn_id: str) -> bool:
        """The policy says what the template would show of a reply; False if it cannot be told."""
        meant = self._reply()
        before = [message.for_template() for message in self._told()]
        asked = self._renderer.text(before, self._tools)
        try:
            whole = self._renderer.text([*before, meant.for_template()], self._tools, ask=False)
        except RequestRefused:
            self._report.unwritable += 1
            return False
        closing = self._renderer.closing
        if not (whole.startswith(asked) and whole.endswith(closing)):
            meant, raw = Message(role="assistant", content=meant.content), meant.content
        else:
            raw = whole[len(asked) : len(whole) - len(closing)]
        said = self._read(meant, raw, prompt, turn_id)
        ids = [*unpack(self._renderer.encode(raw)), *unpack(self._renderer.encode(closing))[:1]]
        reply = Reply(
            turn_id=turn_id,
            content=said.content,
            reasoning=said.reasoning,
            tool_calls=said.tool_calls,
            finish_reason="stop",
            prompt_tokens=prompt.tokens,
            completion_tokens=len(ids),
            cached_tokens=0,
        )
        self._conversation.add(self._renderer, prompt, reply, raw, ids, side=False)
        self._messages += [reply.message(), *self._observations(said.tool_calls)]
        return True

    def _read(self, meant: Message, raw: str, prompt: Prompt, turn_id: str) -> Said:
        thinks = self._renderer.thinks
        said = read_reply(self._parser, raw, turn_id, tools=self._tools, thinks=thinks, opened=prompt.opened)
        wanted = [(call.name, call.value()) for call in meant.tool_calls]
        if [(call.name, call.value()) for call in said.tool_calls] != wanted:
            self._report.wrong.append(f"conversation {self._number}: {wanted}, written {raw!r}, are not read back")
        self._report.calls += len(said.tool_calls)
        return said

    def _reply(self) -> Message:
        chance = self._chance
        count = chance.choice((0, 1, 1, 2)) if self._tools else 0
        if self._report.family == "llama3":
            count = min(count, 1)
        calls = tuple(self._call(i) for i in range(count))
        thought = self._words() if self._report.thinks and chance.random() < 0.7 else ""
        content = "" if calls and chance.random() < 0.4 or self._report.family == "llama3" and calls else self._words()
        return Message(role="assistant", content=content, tool_calls=calls, reasoning=thought)

    def _call(self, number: int) -> ToolCall:
        name = self._chance.choice(("bash", "edit"))
        said = f"functions.{name}:{number}" if self._report.family == "kimi" else ""
        return ToolCall(f"call{number}", name, self._arguments(), said)

    def _arguments(self) -> str:
        value: dict[str, Any] = {"command": self._words()}
        if self._chance.random() < 0.5:
            value["lines"] = self._chance.randint(0, 99)
        return msgspec.json.encode(value).decode()

    def _observations(self, calls: tuple[ToolCall, ...]) -> list[Message]:
        if not calls:
            return [Message(role="user", content=self._words())]
        return [Message(role="tool", content=self._words(), tool_call_id=call.id, name=call.name) for call in calls]

    def _words(self) -> str:
        return " ".join(self._chance.choices(_WORDS, k=self._chance.randint(1, 4)))


def _difference(shown: str, asked: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(shown, asked, strict=False)) if a != b), min(len(shown), len(asked)))
    return f"at {at}: the gateway has {shown[at : at + 60]!r}, the template {asked[at : at + 60]!r}"
