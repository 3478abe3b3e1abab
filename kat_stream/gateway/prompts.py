"""From a model call to its prompt: which turn it goes on from, the ids, and why it forks if it does.

Invariant: `Prompt.ids` begins with the first `prefix_len` tokens of the parent's path. Where the conversation repeats
what this session said, that path is kept as it was sampled, and earlier replies are rendered as they were said, however
the agent wrote them down: an echo without its reasoning, with other ids or other JSON is the same reply.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import msgspec

from kat_stream.gateway.messages import Message, ModelCall, Reply, chain, extend
from kat_stream.gateway.paths import WIDTH, Node, PathTree
from kat_stream.gateway.render import Renderer, Said, text_digest
from topics.record import pack_ints


@dataclass(frozen=True, slots=True)
class Prompt:
    """`ids` int32[P] is the whole prompt; `digest` names the conversation; `chars`, `text_hash` its rendered text."""

    ids: bytes
    parent: Node | None
    prefix_len: int
    fork: str
    thread: str
    digest: bytes
    messages: int
    tools: bytes
    chars: int
    text_hash: bytes
    opened: bool
    """The template began the reasoning that the policy is to write."""
    said: Said | None
    """The reply that it goes on from."""
    appends: bool
    """That reply's whole path is kept."""

    @property
    def tokens(self) -> int:
        return len(self.ids) // WIDTH

    def why(self) -> str:
        """Why the turn does not extend the newest turn of its thread, as known when it is finished."""
        return "branch" if self.appends and self.said is not None and self.said.extended else self.fork


@dataclass(slots=True)
class Conversation:
    """What a session remembers to go on exactly where it was: token paths, and replies by their conversation."""

    tree: PathTree = field(default_factory=PathTree)
    threads: dict[str, Said] = field(default_factory=dict)
    """The newest reply of each thread of the agent's work."""
    _replies: dict[bytes, list[Said]] = field(default_factory=dict)
    _asked: set[bytes] = field(default_factory=set)
    """Digests of the prompts that were answered."""

    def prompt(self, renderer: Renderer, call: ModelCall) -> Prompt:
        """The prompt of a call. RequestRefused if the template cannot render it."""
        digests = chain(call)
        said = self._last_said(call, digests)
        messages = call.messages if said is None else _as_said(call.messages, said)
        full = renderer.text([message.for_template() for message in messages], call.tools)
        tail = None if said is None else renderer.after(said, full, messages, call.tools)
        if said is not None and tail is not None:
            ids, fork = said.node.path() + tail, ""
            parent, prefix_len = self.tree.mount(ids, prefer=said.node)
        else:
            ids = renderer.encode_prompt(full)
            parent, prefix_len = self.tree.mount(ids)
            fork = _rewritten(said, call, full) if said is not None else self._cause(call, digests[-1], full)
        return Prompt(
            ids=ids,
            parent=parent,
            prefix_len=prefix_len,
            fork=fork,
            thread=thread_of(call),
            digest=digests[-1],
            messages=len(call.messages),
            tools=call.tools_digest(),
            chars=len(full),
            text_hash=text_digest(full),
            opened=renderer.opens_reasoning(full),
            said=said,
            appends=tail is not None,
        )

    def add(
        self, renderer: Renderer, prompt: Prompt, reply: Reply, raw: str, sampled: list[int], *, side: bool
    ) -> tuple[Node, Said | None]:
        """A turn was acknowledged: later calls may go on behind it. `raw` is the text of `sampled`.

        Its place in the tree, and its reply unless it was aborted.
        """
        node = self.tree.add(reply.turn_id, prompt.parent, prompt.prefix_len, prompt.ids + pack_ints(sampled))
        if reply.finish_reason == "abort":
            return node, None
        said = Said(
            node=node,
            message=reply.message(),
            raw=raw,
            ended=renderer.ended(sampled, reply.finish_reason),
            prompt_chars=prompt.chars,
            prompt_hash=prompt.text_hash,
            messages=prompt.messages,
            tools=prompt.tools,
            before=prompt.said,
        )
        self._replies.setdefault(extend(prompt.digest, said.message), []).append(said)
        if prompt.said is not None:
            prompt.said.extended = True
        if not side:
            self.threads[prompt.thread] = said
            self._asked.add(prompt.digest)
        return node, said

    def _last_said(self, call: ModelCall, digests: list[bytes]) -> Said | None:
        """The turn that said the last assistant message which this session produced, after exactly these messages."""
        for count in range(len(call.messages), 0, -1):
            echo = call.messages[count - 1]
            if echo.role == "assistant" and (found := self._replies.get(digests[count])):
                # Of equal replies: the one that was thought so, then one that nothing went on from, then the newest.
                thought = echo.reasoning.strip()
                return max(enumerate(found), key=lambda at: (_thinks(at[1], thought), not at[1].extended, at[0]))[1]
        return None

    def _cause(self, call: ModelCall, digest: bytes, full: str) -> str:
        """Why a prompt that goes on from no reply does not extend the newest turn of its thread."""
        if not self.threads:
            return ""
        newest = self.threads.get(thread_of(call))
        if newest is None:
            longest = max(said.messages for said in self.threads.values())
            # A condensed history may come without its instructions; an agent of its own has others.
            return "compaction" if not call.system() and len(call.messages) < longest else "subagent"
        if digest in self._asked:
            return "branch"
        if text_digest(full[: newest.prompt_chars]) == newest.prompt_hash and full.startswith(
            newest.raw.rstrip() or newest.raw, newest.prompt_chars
        ):
            return "retokenisation"
        return "compaction" if len(call.messages) < newest.messages else "other"


def thread_of(call: ModelCall) -> str:
    """What tells the threads of one agent's work apart: its own name for them, else its instructions."""
    return call.thread or blake2b(call.system().encode(errors="surrogatepass"), digest_size=8).hexdigest()


def _thinks(said: Said, thought: str) -> bool:
    return bool(thought) and said.message.reasoning.strip() == thought


def _as_said(messages: Sequence[Message], last: Said) -> tuple[Message, ...]:
    """The messages with this session's own replies as they were said, and results under the ids of those calls."""
    out = list(messages)
    ids: dict[str, str] = {}
    said: Said | None = last
    while said is not None:
        echo = messages[said.messages]
        ids |= {e.id: own.id for e, own in zip(echo.tool_calls, said.message.tool_calls, strict=True) if e.id != own.id}
        out[said.messages] = said.message
        said = said.before
    if not ids:
        return tuple(out)
    return tuple(
        msgspec.structs.replace(message, tool_call_id=ids[message.tool_call_id])
        if message.tool_call_id in ids
        else message
        for message in out
    )


def _rewritten(said: Said, call: ModelCall, full: str) -> str:
    """Why the template does not append to a reply that this session said."""
    if said.tools != call.tools_digest():
        return "tools"
    earlier: Said | None = said
    while earlier is not None:
        if earlier.message.reasoning.strip() not in full:
            return "thinking"
        earlier = earlier.before
    return "template"
