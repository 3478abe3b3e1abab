"""Messages to prompt ids: the chat template, with the ids that were sampled spliced in.

Owns every use of the tokenizer in the gateway. Invariant (promise 6): a sampled reply is never encoded again. What
follows it in the next prompt is encoded on its own and put behind the sampled ids, and only if the template is seen to
append: its text for the earlier messages begins its text for all of them, and the reply still stands there.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import blake2b
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

from kat_stream.errors import ConfigError, RequestRefused
from kat_stream.gateway.messages import Message
from kat_stream.gateway.parsers.reasoning import CLOSING, opened_by
from kat_stream.gateway.paths import Node
from kat_stream.gateway.shape import PROBES, ROLES, Shape
from topics.record import pack_ints

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_MARK = "KatStreamMark"
"""Stands for a reply when the template is asked what it puts behind one."""
_CACHED_PROMPTS = 512
Tools = list[dict[str, Any]]


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
    prompt_chars: int
    prompt_hash: bytes
    messages: int
    """Messages in the prompt."""
    tools: bytes
    """Digest of the tools in the prompt."""
    before: Said | None
    """The reply that the prompt went on from."""
    extended: bool = False
    """Another reply went on from this one."""


class Renderer:
    """A tokenizer and its chat template. ConfigError if the template does not show what assistants say."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        # Only a gateway that serves needs the template engine; workers import this package without the extra `train`.
        from jinja2 import TemplateError

        self._refusals = (TemplateError, TypeError, ValueError)
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self.template = str(tokenizer.chat_template)
        self.thinks = CLOSING in self.template
        """The policy's family reasons before it speaks."""
        self.shape = Shape()
        self.closing = self._probe()
        self.shape = self._probe_shape()
        self._closing_ids = tuple(self._encode(self.closing))
        self.stop_ids = self._stop_ids()
        # The first prompt of a task is the same for its whole group.
        self.encode_prompt = lru_cache(_CACHED_PROMPTS)(self.encode)

    def text(self, messages: Sequence[dict[str, Any]], tools: Tools | None, *, ask: bool = True) -> str:
        """The template's text; `ask` ends it where the assistant is to speak. RequestRefused if there is none."""
        shaped = self.shape.fit(messages)
        try:
            text = self._tokenizer.apply_chat_template(
                shaped, tools=list(tools) if tools else None, tokenize=False, add_generation_prompt=ask
            )
        except self._refusals as error:
            raise RequestRefused(f"the policy's chat template refuses these messages: {error}", "messages") from error
        return str(text)

    def encode(self, text: str) -> bytes:
        """int32[n]: ids of a text in which special tokens are recognised; none is added."""
        return pack_ints(self._encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        return str(self._backend.decode(list(ids), skip_special_tokens=False))

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

    def after(self, said: Said, full: str, messages: Sequence[Message], tools: Tools | None) -> bytes | None:
        """int32[n]: what stands behind the sampled ids of `said` in the prompt whose text is `full`.

        The reply is `messages[said.messages]`. None if the template does not append for these messages.
        """
        tail = self._tail(said, full, messages, tools)
        if tail is None:
            return None
        ids = self._encode(tail)
        known = len(said.ended)
        return pack_ints(ids[known:]) if tuple(ids[:known]) == said.ended else None

    def _tail(self, said: Said, full: str, messages: Sequence[Message], tools: Tools | None) -> str | None:
        at = said.prompt_chars
        if text_digest(full[:at]) != said.prompt_hash:
            return None
        if full.startswith(said.raw + self.closing, at):
            return full[at + len(said.raw) :]
        # The template writes the reply in its own way (tool calls, white space).
        behind = self._behind(said, full, messages, tools)
        if behind is None or not (tail := full[behind:]).startswith(self.closing):
            return None
        # A template that drops part of what was said (reasoning) shows another history: then it does not append.
        kept = full[at:behind]
        shown = (said.message.content.strip(), said.message.reasoning.strip())
        return tail if all(part in kept for part in shown) else None

    def _behind(self, said: Said, full: str, messages: Sequence[Message], tools: Tools | None) -> int | None:
        """Where the template's text of the reply ends: seen by a mark in its place, or by leaving out what follows."""
        shown = [message.for_template() for message in messages]
        marked = [*shown]
        marked[said.messages] = {"role": "assistant", "content": _MARK}
        try:
            other = self.text(marked, tools)
            if other.startswith(full[: said.prompt_chars] + _MARK):
                tail = other[said.prompt_chars + len(_MARK) :]
                if full.endswith(tail):
                    return len(full) - len(tail)
            # Its text of what follows depends on the reply, as where results of tools need their calls.
            upto = self.text(shown[: said.messages + 1], tools, ask=False)
        except RequestRefused:
            return None
        return len(upto) - len(self.closing) if full.startswith(upto) and upto.endswith(self.closing) else None

    def _encode(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids)

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
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except self._refusals:
            return ""

    def _stop_ids(self) -> frozenset[int]:
        """Tokens that end a reply: the special token that closes a turn, and the end of text."""
        special = set(self._backend.get_added_tokens_decoder())
        stops = {self._tokenizer.eos_token_id, *self._closing_ids[:1]}
        return frozenset(token for token in stops if token in special)


def text_digest(text: str) -> bytes:
    """16 bytes that are equal for equal texts, in every process."""
    return blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()


def unpack(ids: bytes) -> list[int]:
    """int32[n] as a list."""
    return array("i", ids).tolist()
