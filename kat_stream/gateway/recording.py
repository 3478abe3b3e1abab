"""A finished call as a Turn record, and its way to the log.

Invariant (promise 1): `record` returns only when the log has acknowledged the turn; a caller that ends a reply before
that breaks the promise.
"""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

import msgspec

from kat_stream.errors import LogUnavailable
from kat_stream.gateway.messages import ModelCall
from kat_stream.gateway.metrics import CALLS, FORKS, ILL_FORMED, PUBLISH_SECONDS, SIDE, TOKENS
from kat_stream.gateway.paths import WIDTH
from kat_stream.gateway.prompts import Prompt
from kat_stream.gateway.sampling import Draft
from kat_stream.gateway.sessions import Session
from kat_stream.gateway.tools import Said
from kat_stream.log import Message
from kat_stream.log.message import seal
from topics.record import pack_floats, pack_ints
from topics.turn import Turn

RETRY_S = 0.2
_PROMPT, _CACHED, _SAMPLED = (TOKENS.labels(kind) for kind in ("prompt", "cached", "sampled"))


class Publisher(Protocol):
    """The part of a log that the gateway needs."""

    async def append(self, *messages: Message, deadline_s: float = ...) -> None:
        """Returns when all are acknowledged; LogUnavailable if that takes longer than `deadline_s`."""


def make_turn(
    session: Session,
    turn_id: str,
    call: ModelCall,
    prompt: Prompt,
    draft: Draft,
    said: Said,
    side: str,
    request: bytes,
) -> Turn:
    """The record of a finished call; it takes the session's next index. `request` is the digest of its body."""
    versions_known = draft.cover()
    whole = draft.finish_reason != "abort" and bool(draft.ids) and versions_known
    about = session.about
    return Turn(
        run=about.run,
        group_id=about.group_id,
        rollout_id=about.rollout_id,
        session_id=session.session_id,
        turn_id=turn_id,
        index=session.next_index(),
        parent=prompt.parent.turn_id if prompt.parent else "",
        prefix_len=prompt.prefix_len,
        prompt_ids=prompt.ids[prompt.prefix_len * WIDTH :],
        sampled_ids=pack_ints(draft.ids),
        logprobs=pack_floats(draft.logprobs),
        spans=tuple(draft.spans),
        finish_reason=draft.finish_reason,
        content=said.content,
        tool_calls=msgspec.json.encode(said.tool_calls).decode() if said.tool_calls else "",
        trainable=about.purpose == "train" and whole and not side,
        fork="" if side else prompt.why(),
        dialect=call.dialect,
        engine=draft.engine,
        cached_tokens=draft.cached_tokens,
        queued_s=draft.queued_s,
        seconds=draft.seconds,
        asked=call.asked,
        reasoning=said.reasoning,
        ill_formed=said.ill_formed,
        side=side,
        thread=prompt.thread,
        conversation=prompt.digest,
        messages=prompt.messages,
        tools=prompt.tools,
        claim=session.claim,
        after=prompt.said.node.turn_id if prompt.said else "",
        prompt_chars=prompt.text.chars,
        prompt_hash=prompt.text.digest,
        request=request,
        matched_stop=draft.matched_stop if draft.matched_stop in call.stop else "",
        routed_experts=draft.routing(prompt.tokens + len(draft.ids) - 1 - routed_from(prompt)),
    )


def routed_from(prompt: Prompt) -> int:
    """First position whose experts the turn records: the last token of what it goes on from has not run before."""
    return max(prompt.prefix_len - 1, 0)


async def record(log: Publisher, turn: Turn, deadline_s: float) -> None:
    """Publish a turn and wait for the acknowledgement; LogUnavailable when the log stays away until the deadline.

    Sealed once: a log that knows the message as one of unknown outcome adds no second copy of it.
    """
    began, message = time.monotonic(), seal(turn)
    while True:
        left = began + deadline_s - time.monotonic()
        try:
            async with asyncio.timeout(left):
                await log.append(message, deadline_s=max(left, 0.001))
            break
        except TimeoutError as error:
            raise LogUnavailable(f"turn {turn.turn_id} was not acknowledged within {deadline_s:g} s") from error
        except LogUnavailable:
            if time.monotonic() - began + RETRY_S > deadline_s:
                raise
            await asyncio.sleep(RETRY_S)
    PUBLISH_SECONDS.observe(time.monotonic() - began)


def count(turn: Turn, prompt_tokens: int) -> None:
    """Metrics of an acknowledged turn."""
    CALLS.labels(turn.dialect, turn.finish_reason).inc()
    _PROMPT.inc(prompt_tokens)
    _CACHED.inc(turn.cached_tokens)
    _SAMPLED.inc(len(turn.sampled_ids) // WIDTH)
    if turn.side:
        SIDE.labels(turn.side).inc()
    if turn.ill_formed:
        ILL_FORMED.inc()
    if turn.fork:
        FORKS.labels(turn.fork).inc()
