"""A path of tokens as a conversation: what was said from the records, the rest from the text by the template's marks.

Owns every use of the policy's tokenizer in this package, which is loaded when first asked: formats of ids need none.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import msgspec

from kat_stream.env.manager.marks import Marks, answered, find_marks, split_tools
from kat_stream.env.manager.rollout import Rollout, Span, Step
from kat_stream.errors import DataError
from kat_stream.gateway.messages import Message, ToolCall
from kat_stream.gateway.render import Renderer, Tools
from kat_stream.policy import load_tokenizer
from topics import Turn
from topics.record import pack_ints

_calls = msgspec.json.Decoder(list[ToolCall])
Said = tuple[Message, int | None]
"""A message and, if the policy said it in this rollout, the number of the turn."""


@dataclass(frozen=True, slots=True)
class Transcript:
    """A conversation; `exact`: the template renders it to the ids of the path, up to the end of the last reply."""

    messages: list[Message]
    tools: Tools | None
    exact: bool


class Policy:
    """The run's model: a Hugging Face directory with a tokenizer and a chat template, or `demo`."""

    def __init__(self, model: str) -> None:
        self._model = model

    @cached_property
    def renderer(self) -> Renderer:
        """ConfigError if the model has no tokenizer or template."""
        return Renderer(load_tokenizer(self._model))

    @cached_property
    def marks(self) -> Marks:
        return find_marks(self.renderer)

    def decode(self, ids: list[int]) -> str:
        """The text of ids, special tokens included."""
        return self.renderer.decode(ids)

    def transcript(self, rollout: Rollout, step: Step) -> Transcript:
        """The conversation up to the end of a turn, without exchanges that failed; DataError if it cannot be read."""
        said: list[Said] = []
        tools: Tools | None = None
        at = 0
        for span in _whole(rollout, step):
            told = self.marks.read(self.decode(step.ids[at : span.start].tolist()), tools)
            if at == 0:
                told, tools = self._without_tools(told)
            said += [(message, None) for message in told]
            said.append((_reply(rollout.steps[span.turn].record), span.turn))
            at = span.stop
        shown = _kept(said, rollout.failed)
        messages = answered(shown)
        return Transcript(messages, tools, self._renders(messages, tools, step))

    def _without_tools(self, told: list[Message]) -> tuple[list[Message], Tools | None]:
        if not told or told[0].role != "system":
            return told, None
        content, tools = split_tools(self.renderer, self.marks, told[0].content)
        first = [] if content is None else [Message(role="system", content=content)]
        return [*first, *told[1:]], tools

    def _renders(self, messages: list[Message], tools: Tools | None, step: Step) -> bool:
        text = self.renderer.text([message.for_template() for message in messages], tools, ask=False)
        return self.renderer.encode(text).startswith(pack_ints(step.ids.tolist()))


def _whole(rollout: Rollout, step: Step) -> list[Span]:
    """Spans of turns that stand on the path whole; of others the rest was told differently: it is read as text."""
    return [span for span in step.spans if span == rollout.steps[span.turn].spans[-1]]


def _reply(record: Turn) -> Message:
    try:
        calls = tuple(_calls.decode(record.tool_calls)) if record.tool_calls else ()
    except msgspec.DecodeError as error:
        raise DataError(f"turn {record.turn_id}: tool_calls: {error}") from error
    return Message(role="assistant", content=record.content, tool_calls=calls, reasoning=record.reasoning)


def _kept(said: list[Said], failed: frozenset[int]) -> list[Message]:
    """Without the replies that failed and what answers each: results of its calls, or else the message behind it."""
    out: list[Message] = []
    dropping = ""
    for message, turn in said:
        if turn is not None and turn in failed:
            dropping = "tool" if message.tool_calls else "user"
        elif dropping and message.role == dropping:
            dropping = "tool" if dropping == "tool" else ""
        else:
            dropping = ""
            out.append(message)
    return out
