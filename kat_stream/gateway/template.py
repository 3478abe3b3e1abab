"""The text that a model's chat template gives for messages.

Owns the use of the template. Invariant: `Template.text` is what the tokenizer's own `apply_chat_template` gives. That
copies every message and tool, looks into every value of theirs and costs more than the template itself; what comes
here are plain JSON values already. So transformers' compiled template is used as it is, but only after it was seen to
give the same on conversations of each kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kat_stream.gateway.locality import trials

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Messages = Sequence[dict[str, Any]]
Tools = list[dict[str, Any]]


class Template:
    """Of plain values: `str`, `int`, `float`, `bool`, None, lists and dicts. Jinja's sandbox lets it change none."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        # Only a gateway that serves needs the template engine; workers import this package without the extra `train`.
        from jinja2 import TemplateError

        self.refusals = (TemplateError, TypeError, ValueError)
        """What `text` raises for messages that the template cannot write."""
        self.source = str(tokenizer.chat_template)
        self._tokenizer = tokenizer
        self._compiled: Any = _compiled(tokenizer.chat_template)
        self._known: dict[str, Any] = {}
        """What the template sees beside messages and tools."""
        if self._compiled is not None:
            self._known = {**self._compiled.globals, "documents": None, **tokenizer.special_tokens_map}
            if not all(
                self._alike([message.for_template() for message in (*history, reply, *following)], tools)
                for history, reply, following, tools in trials()
            ):
                self._compiled = None

    @property
    def direct(self) -> bool:
        """Whether the compiled template is used as it is."""
        return self._compiled is not None

    def text(self, messages: Messages, tools: Tools | None, *, ask: bool) -> str:
        """The text; `ask` ends it where the assistant is to speak. One of `refusals` if there is none."""
        if self._compiled is None or not messages:
            return self._by_transformers(messages, tools, ask=ask)
        return self._directly(messages, tools, ask=ask)

    def _by_transformers(self, messages: Messages, tools: Tools | None, *, ask: bool) -> str:
        shown: list[Any] | None = list(tools) if tools else None
        return str(
            self._tokenizer.apply_chat_template(list(messages), tools=shown, tokenize=False, add_generation_prompt=ask)
        )

    def _directly(self, messages: Messages, tools: Tools | None, *, ask: bool) -> str:
        shown = [_thinking(message) if "reasoning_content" in message else message for message in messages]
        seen = {**self._known, "messages": shown, "tools": tools or None, "add_generation_prompt": ask}
        # As `render` does, but that copies all globals one by one.
        return "".join(self._compiled.root_render_func(self._compiled.new_context(seen, shared=True)))

    def _alike(self, messages: Messages, tools: Tools | None) -> bool:
        texts = []
        for how in (self._directly, self._by_transformers):
            try:
                texts.append(how(messages, tools, ask=True))
            except self.refusals as error:
                texts.append(repr(error))
        return texts[0] == texts[1]


def _compiled(source: Any) -> Any:
    """The template as transformers compiles it, sandbox and filters included; None where that cannot be had."""
    try:
        from transformers.utils.chat_template_utils import _compile_jinja_template
    except ImportError:  # no part of what transformers promises
        return None
    return _compile_jinja_template(source) if isinstance(source, str) else None


def _thinking(message: dict[str, Any]) -> dict[str, Any]:
    """The other name of reasoning that transformers adds, for templates that read that."""
    return {"thinking": message["reasoning_content"], **message}
