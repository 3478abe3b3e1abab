"""`turns`: one model call, written by the gateway before the agent sees the end of the reply.

A turn is a delta: its full prompt is the first `prefix_len` tokens of its parent's path (prompt + sampled)
followed by `prompt_ids`. The arrays `sampled_ids` and `logprobs` have one length; `spans` cover it without gaps.
Two kinds of record are no call but say what became of a session (`MARKS`). A gateway that takes it over writes a claim
first: from there on turns of this session count only if they carry that claim. The last one writes the end, behind
which no turn counts (`kat_stream.gateway.takeover:Lineage`).
"""

from __future__ import annotations

import msgspec

from topics.record import Record

MARKS = {"takeover": "another gateway takes the session over", "end": "the session has ended"}
"""`side` of the records without tokens that say what became of a session."""


class VersionSpan(msgspec.Struct, frozen=True, array_like=True):
    """Sampled tokens [start, end) were drawn from this policy version."""

    version: str
    start: int
    end: int


class Turn(Record, frozen=True, kw_only=True, tag="Turn/1"):
    group_id: str
    rollout_id: str
    session_id: str
    turn_id: str
    index: int
    """Order of completion inside the session, from 0."""
    parent: str = ""
    """turn_id of the turn whose path this prompt extends; empty for a root."""
    prefix_len: int = 0
    prompt_ids: bytes
    """int32[P]: prompt tokens after the first `prefix_len`."""
    sampled_ids: bytes
    """int32[T], exactly as the engine sampled them, the stop token included."""
    logprobs: bytes
    """float32[T]: behaviour log-probabilities from the engine, at the temperature of sampling (greedy: 1)."""
    spans: tuple[VersionSpan, ...]
    finish_reason: str
    """stop | length | abort"""
    content: str = ""
    """The reply's text, for people; never re-encoded."""
    tool_calls: str = ""
    """The reply's tool calls as JSON; empty if there are none."""
    trainable: bool = True
    """False for side requests (titles, probes) and aborted calls: recorded, not trained."""
    fork: str = ""
    """Why this turn did not extend the newest turn of its thread; empty if it did, or began the session.

    thinking | tools | template (the policy's template shows another history than it did), branch (another turn went on
    from there already), compaction, subagent, retokenisation, other (the agent edited the history).
    """
    dialect: str = "chat"
    engine: str = ""
    cached_tokens: int = 0
    queued_s: float = 0.0
    seconds: float = 0.0
    asked: str = ""
    """Sampling parameters that the agent asked for, as JSON."""
    reasoning: str = ""
    """What was thought before `content`, as text, for people; never re-encoded."""
    ill_formed: bool = False
    """A tool call was begun that does not parse: it stands in `content` as it was written."""
    side: str = ""
    """Why this is a side request (model | probe | title | commit); empty for the task's own work. In MARKS: no call."""
    thread: str = ""
    """Thread of the agent's work: its own name for it, else a digest of its instructions."""
    conversation: bytes = b""
    """16 bytes: digest of the prompt's messages, by which a later echo of them is known."""
    messages: int = 0
    """Messages in the prompt."""
    tools: bytes = b""
    """16 bytes: digest of the prompt's tools."""
    claim: str = ""
    """The takeover under which it was written: turn_id of that claim; empty for the gateway that opened the session."""
    after: str = ""
    """turn_id of the reply that the prompt's conversation went on from; other than `parent` if it was rewritten."""
    prompt_chars: int = 0
    """Characters of the prompt's text."""
    prompt_hash: bytes = b""
    """16 bytes: digest of the prompt's text."""
    request: bytes = b""
    """16 bytes: digest of the request's body, by which a retry of it is known."""
    matched_stop: str = ""
    """The agent's stop string that ended it."""
    routed_experts: bytes = b""
    """uint16[R, hidden layers * experts a token], row-major: experts of the path's tokens from max(prefix_len - 1, 0)
    to the last but one, which are those that this call ran or found cached; empty: not recorded."""
