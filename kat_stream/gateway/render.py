"""Messages to prompt ids: the chat template, with the ids that were sampled spliced in.

Invariant (promise 6): a sampled reply is never encoded again. What follows it in the next prompt is encoded on its own
and put behind the sampled ids, and only if the template is seen to append: its text for the earlier messages begins its
text for all of them, and the reply still stands there. In a long conversation that is seen on a shortened one
(kat_stream.gateway.locality).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

from kat_stream.errors import ConfigError, RequestRefused
from kat_stream.gateway.encoding import Encoder
from kat_stream.gateway.ids import unpack
from kat_stream.gateway.locality import STUB, is_local, may_go_on, shorten
from kat_stream.gateway.messages import Message
from kat_stream.gateway.parsers.reasoning import CLOSING, opened_by
from kat_stream.gateway.paths import Node
from kat_stream.gateway.shape import PROBES, ROLES, Shape
from kat_stream.gateway.template import Template
from kat_stream.gateway.text import Text
from topics.record import pack_ints

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_MARK = "KatStreamMark"
"""Stands for a reply when the template is asked what it puts behind one."""
Tools = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Onward:
    """How a prompt goes on behind a reply: `text` is the template's of the reply and all after it, `ids` int32[n]."""

    text: str
    ids: bytes
    """Behind the sampled ids."""


@dataclass(slots=True, eq=False)
class Said:
    """A reply of this session, as needed to go on behind it."""

    node: Node
    message: Message
    """As the policy said it; an echo may have lost reasoning, ids or the order of arguments."""
    raw: str
    """All that was sampled, as text, without the token that ended it."""
    ended: tuple[int, ...]
    """The sampled ids that already belong to the template's end of turn; empty if the reply was cut."""
    text: Text
    """Of the prompt."""
    messages: int
    """Messages in the prompt."""
    tools: bytes
    """Digest of the tools in the prompt."""
    before: Said | None
    """The reply that the prompt went on from."""
    extended: bool = False
    """Another reply went on from this one."""


class Renderer:
    """A tokenizer and its chat template. ConfigError if the template does not show what assistants say.

    `aside`: whoever asks for the ids of a long text that is new gets `NotEncoded`, see `kat_stream.gateway.encoding`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, aside: bool = False) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._encoder = Encoder(tokenizer, aside=aside)
        self._template = Template(tokenizer)
        self.template = self._template.source
        self.thinks = CLOSING in self.template
        """The policy's family reasons before it speaks."""
        self.shape = Shape()
        self.closing = self._probe()
        self.shape = self._probe_shape()
        self._closing_ids = tuple(unpack(self.encode(self.closing)))
        self.stop_ids = self._stop_ids(tokenizer.eos_token_id)
        self.local = is_local(self._behind)
        """What follows a reply can be seen on a shortened history."""

    def text(self, messages: Sequence[dict[str, Any]], tools: Tools | None, *, ask: bool = True) -> str:
        """The template's text; `ask` ends it where the assistant is to speak. RequestRefused if there is none."""
        try:
            return self._template.text(self.shape.fit(messages), tools, ask=ask)
        except self._template.refusals as error:
            raise RequestRefused(f"the policy's chat template refuses these messages: {error}", "messages") from error

    def encode(self, text: str) -> bytes:
        """int32[n]: ids of a text in which special tokens are recognised; none is added. `NotEncoded`: see `aside`."""
        return self._encoder.ids(text)

    async def make_ready(self, text: str, limit: int) -> None:
        """Make the ids of a text that was `NotEncoded`. ContextOverflow if they are soon seen to be `limit`."""
        await self._encoder.make_ready(text, limit)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        return str(self._backend.decode(list(ids), skip_special_tokens=False)) if ids else ""

    def opens_reasoning(self, prompt: str) -> bool:
        """Whether a prompt's text ends in reasoning that the policy is to go on with."""
        return self.thinks and opened_by(prompt)

    def visible(self, ids: Sequence[int], finish_reason: str) -> str:
        """The text of a reply without the token that ended it."""
        if finish_reason == "stop" and ids and ids[-1] in self.stop_ids:
            ids = ids[:-1]
        return self.decode(ids)

    def ended(self, ids: Sequence[int], finish_reason: str) -> tuple[int, ...]:
        """The longest end of a finished reply that begins the template's end of turn."""
        if finish_reason != "stop":
            return ()
        for size in range(min(len(ids), len(self._closing_ids)), 0, -1):
            if tuple(ids[-size:]) == self._closing_ids[:size]:
                return self._closing_ids[:size]
        return ()

    def after(self, said: Said, full: str, messages: Sequence[Message], tools: Tools | None) -> Onward | None:
        """How the prompt whose text is `full` goes on behind `said`, which is `messages[said.messages]`.

        `full` begins with the text of the prompt of `said`. None if the template does not append for these messages.
        """
        split = self._split(said.message, said.raw, said.text.chars, full, messages, said.messages, tools)
        return None if split is None else self._onward(said, *split)

    def after_long(
        self, said: Said, history: Sequence[Message], following: Sequence[Message], *, thought: bool, tools: bool
    ) -> Onward | None:
        """As `after`, seen on a shortened `history`; `thought`: there is reasoning in these messages.

        None also where that proves nothing: then the whole has to be rendered.
        """
        if not self.local or not may_go_on(following, thought=thought) or (short := shorten(history)) is None:
            return None
        split = self._behind(short, said.message, following, STUB if tools else None, said.raw)
        return None if split is None else self._onward(said, *split)

    def _onward(self, said: Said, kept: str, tail: str) -> Onward | None:
        ids, ended = self.encode(tail), pack_ints(list(said.ended))
        return Onward(kept + tail, ids[len(ended) :]) if ids.startswith(ended) else None

    def _behind(
        self,
        history: Sequence[Message],
        reply: Message,
        following: Sequence[Message],
        tools: Tools | None,
        raw: str | None = None,
    ) -> tuple[str, str] | None:
        """The template's text of a reply and of all behind it, None if it does not append or refuses these messages.

        `raw` is what was sampled as that reply, if it was.
        """
        messages = (*history, reply, *following)
        try:
            before = self.text([message.for_template() for message in history], tools)
            full = self.text([message.for_template() for message in messages], tools)
        except RequestRefused:
            return None
        if not full.startswith(before):
            return None
        return self._split(reply, raw, len(before), full, messages, len(history), tools)

    def _split(
        self,
        reply: Message,
        raw: str | None,
        at: int,
        full: str,
        messages: Sequence[Message],
        place: int,
        tools: Tools | None,
    ) -> tuple[str, str] | None:
        """`full[at:]` as the text of the reply `messages[place]` and what is behind it; None unless it is all there."""
        if raw is not None and full.startswith(raw + self.closing, at):
            return raw, full[at + len(raw) :]
        # The template writes the reply in its own way (tool calls, white space).
        end = self._end_of(at, full, messages, place, tools)
        if end is None or not (tail := full[end:]).startswith(self.closing):
            return None
        # A template that drops part of what was said (reasoning) shows another history: then it does not append.
        kept = full[at:end]
        shown = (reply.content.strip(), reply.reasoning.strip())
        return (kept, tail) if all(part in kept for part in shown) else None

    def _end_of(self, at: int, full: str, messages: Sequence[Message], place: int, tools: Tools | None) -> int | None:
        """Where the template's text of the reply ends: seen by a mark in its place, or by leaving out what follows."""
        shown = [message.for_template() for message in messages]
        marked = [*shown]
        marked[place] = {"role": "assistant", "content": _MARK}
        try:
            other = self.text(marked, tools)
            if other.startswith(full[:at] + _MARK):
                tail = other[at + len(_MARK) :]
                if full.endswith(tail):
                    return len(full) - len(tail)
            # Its text of what follows depends on the reply, as where results of tools need their calls.
            upto = self.text(shown[: place + 1], tools, ask=False)
        except RequestRefused:
            return None
        return len(upto) - len(self.closing) if full.startswith(upto) and upto.endswith(self.closing) else None

    def _probe(self) -> str:
        """What the template puts behind an assistant's message, whatever follows."""
        asked = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
        try:
            ended = self.text(asked, None, ask=False).partition(_MARK)
            followed = self.text([*asked, asked[0]], None, ask=False).partition(_MARK)
        except RequestRefused as error:
            raise ConfigError(f"policy.model: {error}") from error
        if not ended[1] or not followed[1]:
            raise ConfigError("policy.model: the chat template does not show what an assistant says")
        return commonprefix([ended[2], followed[2]])

    def _probe_shape(self) -> Shape:
        """The least that has to be changed in messages for the template to show all of them."""
        shape = next((shape for shape in ROLES if all(self._shows(shape, roles) for roles in PROBES)), ROLES[-1])
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"a": _MARK}}}
        asked: list[dict[str, Any]] = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        as_text = replace(shape, text_arguments=True)
        if _MARK not in self._attempt(shape.fit(asked)) and _MARK in self._attempt(as_text.fit(asked)):
            return as_text
        return shape

    def _shows(self, shape: Shape, roles: str) -> bool:
        names = {"s": "system", "u": "user", "a": "assistant"}
        marks = [f"{_MARK}{i}" for i in range(len(roles))]
        asked = [{"role": names[role], "content": mark} for role, mark in zip(roles, marks, strict=True)]
        text = self._attempt(shape.fit(asked))
        return all(mark in text for mark in marks)

    def _attempt(self, messages: list[dict[str, Any]]) -> str:
        """The template's text, empty if it refuses."""
        try:
            return self._template.text(messages, None, ask=True)
        except self._template.refusals:
            return ""

    def _stop_ids(self, end_of_text: int | None) -> frozenset[int]:
        """Tokens that end a reply: the special token that closes a turn, and the end of text."""
        special = set(self._backend.get_added_tokens_decoder())
        stops = {end_of_text, *self._closing_ids[:1]}
        return frozenset(token for token in stops if token in special)
