"""From a model call to its prompt: which turn it goes on from, the ids, and why it forks if it does.

Invariant: `Prompt.ids` begins with the first `prefix_len` tokens of the parent's path. Where the conversation repeats
what this session said, that path is kept as it was sampled.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kat_stream.gateway.messages import ModelCall, Reply, chain, extend
from kat_stream.gateway.paths import WIDTH, Node, PathTree
from kat_stream.gateway.render import Renderer, Said
from topics.record import pack_ints


@dataclass(frozen=True, slots=True)
class Prompt:
    """`ids` int32[P] is the whole prompt; `digest` names the conversation; `chars`, `text_hash` its rendered text."""

    ids: bytes
    parent: Node | None
    prefix_len: int
    fork: str
    digest: bytes
    messages: int
    chars: int
    text_hash: int

    @property
    def tokens(self) -> int:
        return len(self.ids) // WIDTH


@dataclass(slots=True)
class Conversation:
    """What a session remembers to go on exactly where it was: token paths, and replies by their conversation."""

    tree: PathTree = field(default_factory=PathTree)
    newest: Said | None = None
    _replies: dict[bytes, list[Said]] = field(default_factory=dict)

    def prompt(self, renderer: Renderer, call: ModelCall) -> Prompt:
        """The prompt of a call. RequestRefused if the template cannot render it."""
        digests = chain(call)
        full = renderer.text([message.for_template() for message in call.messages], call.tools)
        said = self._last_said(call, digests)
        tail = None if said is None else renderer.after(said, full, call.messages, call.tools)
        if said is not None and tail is not None:
            ids = said.node.path() + tail
            parent, prefix_len = self.tree.mount(ids, prefer=said.node)
            fork = "" if said is self.newest else "other"
        else:
            ids = renderer.encode_prompt(full)
            parent, prefix_len = self.tree.mount(ids)
            fork = "template" if said is not None else self._cause(call, full)
        return Prompt(ids, parent, prefix_len, fork, digests[-1], len(call.messages), len(full), hash(full))

    def add(self, renderer: Renderer, prompt: Prompt, reply: Reply, raw: str, sampled: list[int]) -> None:
        """A turn was acknowledged: later calls may go on behind it. `raw` is the text of `sampled`."""
        node = self.tree.add(reply.turn_id, prompt.parent, prompt.prefix_len, prompt.ids + pack_ints(sampled))
        if reply.finish_reason == "abort":
            return
        ended = renderer.ended(sampled, reply.finish_reason)
        said = Said(node, reply.content, raw, ended, prompt.chars, prompt.text_hash, prompt.messages)
        self.newest = said
        self._replies.setdefault(extend(prompt.digest, reply.message()), []).append(said)

    def _last_said(self, call: ModelCall, digests: list[bytes]) -> Said | None:
        """The turn that said the last assistant message which this session produced, after exactly these messages."""
        for count in range(len(call.messages), 0, -1):
            if call.messages[count - 1].role == "assistant" and (found := self._replies.get(digests[count])):
                return self.newest if self.newest in found else found[-1]
        return None

    def _cause(self, call: ModelCall, full: str) -> str:
        """Why a prompt that goes on from no reply does not extend the newest turn."""
        newest = self.newest
        if newest is None:
            return ""
        if hash(full[: newest.prompt_chars]) == newest.prompt_hash and full.startswith(
            newest.raw.rstrip() or newest.raw, newest.prompt_chars
        ):
            return "retokenisation"
        return "compaction" if len(call.messages) < newest.messages else "other"
