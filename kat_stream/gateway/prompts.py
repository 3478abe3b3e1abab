"""From a model call to its prompt: which turn it goes on from, the ids, and why it forks if it does.

Invariant: `Prompt.ids` begins with the first `prefix_len` tokens of the parent's path. Where the conversation repeats
what this session said, that path is kept as it was sampled, and earlier replies are rendered as they were said, however
the agent wrote them down: an echo without its reasoning, with other ids or other JSON is the same reply.
What a call repeats of the one before it is compared, not read again: a turn costs what is new in it, and the whole
conversation is rendered each time it has doubled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import msgspec

from kat_stream.gateway.ids import joined, unpack, written
from kat_stream.gateway.locality import thinks
from kat_stream.gateway.messages import Message, ModelCall, Reply, chain, extend
from kat_stream.gateway.paths import WIDTH, Node, PathTree
from kat_stream.gateway.render import Onward, Renderer, Said
from kat_stream.gateway.text import Text, text_digest
from topics.record import pack_ints

_HEARD = 8
"""Threads of a session whose newest prompt is remembered message by message."""


@dataclass(slots=True, eq=False)
class Heard:
    """The messages of a prompt, kept while its reply is the newest of its thread: the next call repeats them."""

    messages: tuple[Message, ...]
    """As the agent wrote them."""
    digests: list[bytes]
    """Of messages[:n]."""
    shown: tuple[Message, ...]
    """As the template got them: replies as they were said."""
    ids: dict[str, str]
    """Ids that the agent gave to calls, and those that the template gets for them."""
    thought: bool
    """There is reasoning in them."""
    rendered: int
    """Messages when all of them were rendered last."""
    said: Said | None = None
    """The reply."""
    wire: bytes = b""
    """Ids of the path up to the reply that the messages go on from, later of the reply, if known; see `Prompt.wire`."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """`ids` int32[P] is the whole prompt; `digest` names the conversation, `text` is its rendered text."""

    ids: bytes
    tokens: int
    parent: Node | None
    prefix_len: int
    fork: str
    thread: str
    digest: bytes
    messages: int
    tools: bytes
    text: Text
    opened: bool
    """The template began the reasoning that the policy is to write."""
    said: Said | None
    """The reply that it goes on from."""
    appends: bool
    """That reply's whole path is kept."""
    heard: Heard | None = None
    wire: bytes = b""
    """`ids` as an engine reads them: the inside of a JSON list."""

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
    _heard: dict[str, Heard] = field(default_factory=dict)
    """The newest prompt of each thread."""

    def prompt(self, renderer: Renderer, call: ModelCall) -> Prompt:
        """The prompt of a call; changes nothing. RequestRefused if the template cannot render it; `NotEncoded`."""
        thread = thread_of(call)
        said, heard = self._hear(call, thread)
        tools, full, fork = call.tools_digest(), "", ""
        onward = None if said is None else _long(renderer, call, said, heard, tools)
        if said is not None and onward is not None:
            text = said.text.with_more(onward.text)
        else:
            full = renderer.text([message.for_template() for message in heard.shown], call.tools)
            before, text = Text.of(full, said.text.chars if said is not None else 0)
            heard.rendered = len(heard.shown)
            if said is not None and said.text.digest == before:
                onward = renderer.after(said, full, heard.shown, call.tools)
        if said is not None and onward is not None:
            ids = said.node.path() + onward.ids
            parent, prefix_len = self.tree.mount(ids, prefer=said.node)
            wire = joined(heard.wire or written(unpack(said.node.path())), written(unpack(onward.ids)))
        else:
            ids = renderer.encode(full)
            parent, prefix_len = self.tree.mount(ids)
            wire = written(unpack(ids))
            fork = self._cause(call, thread, heard.digests[-1], full) if said is None else _rewritten(said, tools, full)
        return Prompt(
            ids=ids,
            tokens=len(ids) // WIDTH,
            parent=parent,
            prefix_len=prefix_len,
            fork=fork,
            thread=thread,
            digest=heard.digests[-1],
            messages=len(call.messages),
            tools=tools,
            text=text,
            opened=renderer.opens_reasoning(full if onward is None else onward.text),
            said=said,
            appends=onward is not None,
            heard=heard,
            wire=wire,
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
            text=prompt.text,
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
            self._remember(prompt, said, sampled)
        return node, said

    def _remember(self, prompt: Prompt, said: Said, sampled: list[int]) -> None:
        self._heard.pop(prompt.thread, None)
        if prompt.heard is not None:
            prompt.heard.said = said
            prompt.heard.wire = joined(prompt.wire, written(sampled))
            self._heard[prompt.thread] = prompt.heard
        if len(self._heard) > _HEARD:
            del self._heard[next(iter(self._heard))]

    def _hear(self, call: ModelCall, thread: str) -> tuple[Said | None, Heard]:
        """The reply that a call goes on from, and its messages; what it repeats of its thread is not read again."""
        known = self._heard.get(thread)
        if known is not None and call.messages[: len(known.messages)] == known.messages:
            digests = chain(call, known.digests)
            said = self._last_said(call, digests)
            if said is not None and said is known.said:
                return said, _next(known, said, call, digests)
        else:
            digests = chain(call)
            said = self._last_said(call, digests)
        ids = _renamed(call.messages, said)
        shown = _as_said(call.messages, said, ids)
        return said, Heard(call.messages, digests, shown, ids, any(map(thinks, shown)), rendered=0)

    def _last_said(self, call: ModelCall, digests: list[bytes]) -> Said | None:
        """The turn that said the last assistant message which this session produced, after exactly these messages."""
        for count in range(len(call.messages), 0, -1):
            echo = call.messages[count - 1]
            if echo.role == "assistant" and (found := self._replies.get(digests[count])):
                # Of equal replies: the one that was thought so, then one that nothing went on from, then the newest.
                thought = echo.reasoning.strip()
                return max(enumerate(found), key=lambda at: (_thinks(at[1], thought), not at[1].extended, at[0]))[1]
        return None

    def _cause(self, call: ModelCall, thread: str, digest: bytes, full: str) -> str:
        """Why a prompt that goes on from no reply does not extend the newest turn of its thread."""
        if not self.threads:
            return ""
        newest = self.threads.get(thread)
        if newest is None:
            longest = max(said.messages for said in self.threads.values())
            # A condensed history may come without its instructions; an agent of its own has others.
            return "compaction" if not call.system() and len(call.messages) < longest else "subagent"
        if digest in self._asked:
            return "branch"
        before = newest.text.chars
        raw = newest.raw.rstrip() or newest.raw
        if full.startswith(raw, before) and text_digest(full[:before]) == newest.text.digest:
            return "retokenisation"
        return "compaction" if len(call.messages) < newest.messages else "other"


def thread_of(call: ModelCall) -> str:
    """What tells the threads of one agent's work apart: its own name for them, else its instructions."""
    return call.thread or blake2b(call.system().encode(errors="surrogatepass"), digest_size=8).hexdigest()


def _thinks(said: Said, thought: str) -> bool:
    return bool(thought) and said.message.reasoning.strip() == thought


def _next(known: Heard, said: Said, call: ModelCall, digests: list[bytes]) -> Heard:
    """A call that begins as the one before it, whose reply it goes on from."""
    before = len(known.messages)
    echo, following = call.messages[before], call.messages[before + 1 :]
    ids = known.ids | _other_ids(echo, said.message)
    new = (said.message, *(under(ids, message) for message in following))
    return Heard(
        messages=(*known.messages, echo, *following),
        digests=digests,
        shown=(*known.shown, *new),
        ids=ids,
        thought=known.thought or any(map(thinks, new)),
        rendered=known.rendered,
        wire=known.wire,
    )


def _long(renderer: Renderer, call: ModelCall, said: Said, heard: Heard, tools: bytes) -> Onward | None:
    """How a long conversation goes on; None if the whole has to be rendered to tell, as it has when it doubled."""
    if said.tools != tools or not said.text.seen or len(heard.shown) >= 2 * heard.rendered:
        return None
    history, following = heard.shown[: said.messages], heard.shown[said.messages + 1 :]
    return renderer.after_long(said, history, following, thought=heard.thought, tools=bool(call.tools))


def _renamed(messages: Sequence[Message], last: Said | None) -> dict[str, str]:
    """Ids that the agent gave to calls, and those that the template gets for what this session said."""
    ids: dict[str, str] = {}
    said = last
    while said is not None:
        ids |= _other_ids(messages[said.messages], said.message)
        said = said.before
    return ids


def _other_ids(echo: Message, own: Message) -> dict[str, str]:
    calls = zip(echo.tool_calls, own.tool_calls, strict=True)
    return {theirs.id: ours.shown_id for theirs, ours in calls if theirs.id != ours.shown_id}


def _as_said(messages: Sequence[Message], last: Said | None, ids: dict[str, str]) -> tuple[Message, ...]:
    """The messages with this session's own replies as they were said, and results under the ids of those calls."""
    out = [under(ids, message) for message in messages] if ids else list(messages)
    said = last
    while said is not None:
        out[said.messages] = said.message
        said = said.before
    return tuple(out)


def under(ids: dict[str, str], message: Message) -> Message:
    """A result under the id of its call."""
    own = ids.get(message.tool_call_id)
    return message if own is None else msgspec.structs.replace(message, tool_call_id=own)


def _rewritten(said: Said, tools: bytes, full: str) -> str:
    """Why the template does not append to a reply that this session said."""
    if said.tools != tools:
        return "tools"
    earlier: Said | None = said
    while earlier is not None:
        if earlier.message.reasoning.strip() not in full:
            return "thinking"
        earlier = earlier.before
    return "template"
