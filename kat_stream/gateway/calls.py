"""The life of a model call, apart from the connections that watch it: coalesced, sampled, recorded, abandoned.

Invariants: a call's result is set after the log acknowledged its turn, never before. A call that nobody watches is
aborted after a grace time, unless its client comes back for it. Every call ends: its waits have deadlines.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import msgspec

from kat_stream.engines.client import SamplingParams
from kat_stream.errors import ContextOverflow, DeadlineExceeded, EngineError, KatError, RequestRefused
from kat_stream.gateway.encoding import NotEncoded
from kat_stream.gateway.limits import Limits
from kat_stream.gateway.messages import ModelCall, Reply
from kat_stream.gateway.metrics import CALL_SECONDS, COALESCED, IN_FLIGHT
from kat_stream.gateway.parsers.base import ToolParser
from kat_stream.gateway.peers import Pulse
from kat_stream.gateway.prompts import Conversation, Prompt
from kat_stream.gateway.recording import Publisher, count, make_turn, record, routed_from
from kat_stream.gateway.render import Renderer
from kat_stream.gateway.sampling import Draft, Sampler
from kat_stream.gateway.sessions import Session, ended
from kat_stream.gateway.side import side_reason
from kat_stream.gateway.tools import AUTO, NONE, family, get_parser, read_reply
from kat_stream.routing.router import Router

log = logging.getLogger(__name__)


class News:
    """Tells all who wait that a call has more. No part of the call: a ring would keep each ended call as garbage."""

    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def tell(self) -> None:
        """Whoever waits now goes on."""
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self) -> None:
        """Until the next one is told."""
        await self._event.wait()


class Call:
    """One model call. Watch it with `async with`; `result` is the reply, `wait_for_news` tells a stream of more ids."""

    def __init__(
        self, session: Session, asked: ModelCall, prompt: Prompt, digest: bytes, side: str, service: CallService
    ) -> None:
        self.session, self.asked, self.prompt, self.digest, self.side = session, asked, prompt, digest, side
        self.turn_id = secrets.token_hex(16)
        self.delivered = False
        """The whole answer went to a client."""
        self.watchers = 0
        self.began = time.monotonic()
        self.result: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self.task: asyncio.Task[None] | None = None
        self._service = service
        self.news = News()
        """More was sampled, or the call ended."""
        self.sampler = service.sampler(self)

    async def __aenter__(self) -> Call:
        self.watchers += 1
        return self

    async def __aexit__(self, *_: object) -> None:
        self.watchers -= 1
        if self.watchers == 0 and not self.result.done():
            self._service.unwatched(self)

    def let_go(self) -> None:
        """The call is remembered for a while, for retries; its prompt, which is in the record, is not."""
        self.task = None
        self.sampler.prompt = b""
        self.prompt = replace(self.prompt, ids=b"", wire=b"", heard=None)
        self.asked = msgspec.structs.replace(self.asked, messages=(), tools=None)

    async def wait_for_news(self, known: int, timeout_s: float) -> bool:
        """Wait until more than `known` ids were sampled or the call ended; False if neither happens in time."""
        if self.result.done() or len(self.sampler.draft.ids) > known:
            return True
        try:
            async with asyncio.timeout(timeout_s):
                await self.news.wait()
        except TimeoutError:
            return False
        return True


class CallService:
    """Starts calls and brings them to their end."""

    def __init__(self, renderer: Renderer, publisher: Publisher, router: Router, tools: str, limits: Limits) -> None:
        self.renderer, self.limits = renderer, limits
        self.pulse = Pulse()
        self.parser: ToolParser = get_parser(family(renderer.template) if tools == AUTO else tools)
        self._publisher, self._router = publisher, router
        self._tasks: set[asyncio.Task[None]] = set()

    async def begin(self, session: Session, asked: ModelCall, digest: bytes, *, retry: bool) -> Call:
        """The call that answers this request: an earlier one if this is its retry, else a new one. RequestRefused."""
        return await self._with_ids(session, lambda: self._begin(session, asked, digest, retry=retry))

    async def count(self, session: Session, asked: ModelCall) -> int:
        """Tokens of the prompt that this call would have, were it made. RequestRefused.

        Of one that is far longer than the session's context: as many as were counted, which are too many.
        """
        try:
            return (await self._with_ids(session, lambda: session.conversation.prompt(self.renderer, asked))).tokens
        except ContextOverflow as error:
            return error.tokens

    async def _with_ids[T](self, session: Session, work: Callable[[], T]) -> T:
        """What `work` gives, begun anew after each wait for ids: the session may have changed meanwhile.

        A session waits for one text at a time, so that the others come in between. DeadlineExceeded.
        """
        try:
            async with asyncio.timeout(self.limits.call_s):
                while True:
                    try:
                        return work()
                    except NotEncoded as long:
                        text = long.text
                    async with session.encoding:
                        await self.renderer.make_ready(text, session.about.sampling.max_context)
        except TimeoutError as error:
            raise DeadlineExceeded("the ids of a long prompt", self.limits.call_s) from error

    def _begin(self, session: Session, asked: ModelCall, digest: bytes, *, retry: bool) -> Call:
        if session.closed:
            raise ended(session)
        if (known := _retried(session, digest, retry)) is not None:
            COALESCED.inc()
            return known
        side = side_reason(asked)
        self._check(session, side=bool(side))
        prompt = session.conversation.prompt(self.renderer, asked)
        _check_context(session, prompt)
        call = Call(session, asked, prompt, digest, side, self)
        session.running.add(call)
        session.remember(digest, call, self.limits.remembered_calls)
        call.task = self._spawn(self._run(call))
        return call

    def sampler(self, call: Call) -> Sampler:
        """How a call samples: the session's parameters, whatever was asked for; only fewer tokens may be had."""
        forced = call.session.about.sampling
        budget = min(forced.max_new_tokens, forced.max_context - call.prompt.tokens)
        if call.asked.max_tokens is not None:
            budget = min(budget, call.asked.max_tokens)
        params = SamplingParams(
            max_new_tokens=budget,
            temperature=forced.temperature,
            top_p=forced.top_p,
            stop=call.asked.stop,
            stop_token_ids=tuple(self.renderer.stop_ids),
            stream_interval=self.limits.stream_tokens if call.asked.stream else None,
        )
        return Sampler(
            router=self._router,
            limits=self.limits,
            session=call.session.session_id,
            call_id=call.turn_id,
            prompt=call.prompt.wire,
            prompt_tokens=call.prompt.tokens,
            routed_from=routed_from(call.prompt),
            sampling=params,
            budget=budget,
            decode=self.renderer.decode,
            stream=call.asked.stream,
            grown=call.news.tell,
        )

    def unwatched(self, call: Call) -> None:
        """The last connection that waited for this call went away."""
        loop = asyncio.get_running_loop()
        loop.call_later(self.limits.disconnect_grace_s, self._abandon_if_unwatched, call)

    def abandon(self, call: Call) -> None:
        """Abort a call on its engine; it is recorded with what it has. One that is sampled is only waited for."""
        if not call.sampler.aborted and not call.sampler.draft.finish_reason:
            call.sampler.aborted = True
            self._spawn(self._abort(call))

    async def finish_session(self, session: Session, deadline_s: float) -> None:
        """Abort what is in flight and wait until it is recorded; cancelled at the deadline."""
        session.closed = True
        for call in list(session.running):
            self.abandon(call)
        tasks = {call.task for call in session.running if call.task is not None}
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=deadline_s)
            await _cancel(late)
        session.recent.clear()
        session.conversation = Conversation()
        self._router.forget(session.session_id)

    def give_up(self, session: Session) -> None:
        """Another gateway may have the session: stop what runs for it and record nothing."""
        for call in session.running:
            if call.task is not None:
                call.task.cancel()
        self._router.forget(session.session_id)

    async def close(self) -> None:
        """Cancel all that runs."""
        await _cancel(set(self._tasks))

    def parser_for(self, asked: ModelCall) -> ToolParser:
        return self.parser if asked.tools_allowed else NONE

    def _check(self, session: Session, *, side: bool) -> None:
        if len(session.running) >= self.limits.calls_per_session:
            raise too_many("calls")
        limit = session.about.sampling.max_turns
        # One that is being aborted will not count, and its retry must not be refused for it.
        running = sum(bool(call.side) == side and not call.sampler.aborted for call in session.running)
        if session.answered(side=side) + running >= limit:
            raise RequestRefused(f"this session has used its {limit} turns", code="turn_limit_reached")

    def _abandon_if_unwatched(self, call: Call) -> None:
        if call.watchers == 0 and not call.result.done():
            self.abandon(call)

    async def _abort(self, call: Call) -> None:
        try:
            async with asyncio.timeout(self.limits.abort_s):
                await call.sampler.abort()
        except (EngineError, DeadlineExceeded, TimeoutError) as error:
            log.warning("turn %s could not be aborted on its engine: %s", call.turn_id, error)
        if (task := call.task) is not None:
            await asyncio.wait({task}, timeout=self.limits.abort_s if call.sampler.dispatched else 0)
            if not call.sampler.draft.finish_reason:
                task.cancel()

    async def _run(self, call: Call) -> None:
        IN_FLIGHT.inc()
        try:
            call.result.set_result(await self._answer(call))
        except KatError as error:
            _fail(call, error)
        except asyncio.CancelledError:
            _fail(call, RequestRefused("the call was given up", status=503, code="cancelled"))
            raise
        except Exception as error:  # a defect of ours: the client that waits must get an answer, not silence
            log.exception("turn %s failed", call.turn_id)
            _fail(call, error)
        finally:
            IN_FLIGHT.dec()
            call.session.running.discard(call)
            call.let_go()
            call.news.tell()

    async def _answer(self, call: Call) -> Reply:
        """Sample, record, remember; the reply may be seen once this returns."""
        draft = await self._sample(call)
        raw = self.renderer.visible(draft.ids, draft.finish_reason)
        said = read_reply(
            self.parser_for(call.asked),
            without_stop(raw, draft),
            call.turn_id,
            tools=call.asked.tools,
            thinks=self.renderer.thinks,
            opened=call.prompt.opened,
        )
        turn = make_turn(call.session, call.turn_id, call.asked, call.prompt, draft, said, call.side, call.digest)
        await record(self._publisher, turn, self.limits.publish_s)
        if self.pulse.stalled():
            # Another gateway may have claimed the session before this turn: only the log knows whether it counts.
            call.session.moved = True
            raise ended(call.session)
        reply = Reply(
            turn_id=call.turn_id,
            content=said.content,
            reasoning=said.reasoning,
            ill_formed=said.ill_formed,
            tool_calls=said.tool_calls,
            finish_reason=draft.finish_reason,
            matched_stop=turn.matched_stop,
            prompt_tokens=call.prompt.tokens,
            completion_tokens=len(draft.ids),
            cached_tokens=draft.cached_tokens,
        )
        call.session.acknowledged(turn)
        call.session.conversation.add(self.renderer, call.prompt, reply, raw, draft.ids, side=bool(call.side))
        count(turn, call.prompt.tokens)
        CALL_SECONDS.observe(time.monotonic() - call.began)
        return reply

    async def _sample(self, call: Call) -> Draft:
        """The draft; an abandoned call that reached an engine has one whatever became of the engine."""
        try:
            return await call.sampler.run()
        except (KatError, asyncio.CancelledError):
            if not (call.sampler.aborted and call.sampler.dispatched):
                raise
            call.sampler.draft.finish_reason = "abort"
            return call.sampler.draft

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def too_many(what: str) -> RequestRefused:
    """The answer to a session that does more at once than it may."""
    return RequestRefused(f"too many {what} of this session at once", status=429, code="rate_limit_exceeded")


def _retried(session: Session, digest: bytes, retry: bool) -> Call | None:
    """The call that this request repeats: one whose answer nobody got or awaits, else, if it is marked, the newest."""
    alive = [call for call in reversed(session.recent.get(digest, ())) if not _broken(call)]
    orphans = (call for call in alive if call.watchers == 0 and not call.delivered)
    # An agent may ask the same several times at once: the one that broke is not the one that another client awaits.
    return next(orphans, alive[0] if retry and alive else None)


def _broken(call: Call) -> bool:
    failed = call.result.done() and (call.result.cancelled() or call.result.exception() is not None)
    return failed or call.sampler.aborted


def _check_context(session: Session, prompt: Prompt) -> None:
    limit = session.about.sampling.max_context
    if prompt.tokens >= limit:
        raise ContextOverflow(prompt.tokens, limit)


def without_stop(text: str, draft: Draft) -> str:
    """The text before the stop string that ended it: engines keep it in the ids, and what its last token says more."""
    at = text.find(draft.matched_stop) if draft.matched_stop else -1
    return text if at < 0 else text[:at]


def _fail(call: Call, error: Exception) -> None:
    call.result.set_exception(error)
    # Whether anybody still watches is not known; an unread failure is not worth a warning of the event loop.
    call.result.exception()


async def _cancel(tasks: set[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=1.0)
