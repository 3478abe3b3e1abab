"""The listener for agents: session in the path, its secret as the API key, one handler for every path.

Invariant: nothing that opens, closes or shows other sessions can be reached from here, and every answer is in the
dialect's shape, errors included.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable
from hashlib import blake2b

import msgspec
from aiohttp import hdrs, web

from kat_stream.errors import DeadlineExceeded, EngineRejected, KatError, RequestRefused
from kat_stream.gateway.calls import Call, CallService, too_many
from kat_stream.gateway.dialects import CHAT, Dialect, ReplyStream, listing, route, spoken_at
from kat_stream.gateway.door import Door
from kat_stream.gateway.limits import Limits
from kat_stream.gateway.messages import ModelCall, Reply
from kat_stream.gateway.metrics import REFUSED
from kat_stream.gateway.sessions import Session, Sessions, ended
from kat_stream.gateway.side import SUFFIX
from kat_stream.gateway.stream_text import Shown, StreamText
from kat_stream.gateway.takeover import Takeover
from kat_stream.gateway.threads import named_thread

log = logging.getLogger(__name__)

KEEPALIVE = b": keepalive\n\n"
_KEY = b'"stream"'
_STREAM = re.compile(_KEY + rb"\s*:\s*(?:true|false)")
_KEYS = ("x-api-key", "x-goog-api-key")
_SSE = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}


class DataListener:
    """Serves what agents ask for."""

    def __init__(self, sessions: Sessions, calls: CallService, model_name: str, limits: Limits, door: Door) -> None:
        self._sessions, self._calls, self._limits, self._door = sessions, calls, limits, door
        self.takeover: Takeover | None = None
        """Where sessions come from that other gateways opened."""
        self._models = (model_name, model_name + SUFFIX)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Any request. Errors become answers; a client that goes away cancels this, not the call it watched."""
        _, _, rest = request.path.partition("/s/")
        session_id, _, path = rest.partition("/")
        dialect = spoken_at(path) if request.path.startswith("/s/") else CHAT
        try:
            return await self._serve(request, session_id, path)
        except RequestRefused as error:
            return _refusal(dialect, error)
        except KatError as error:
            return _refusal(dialect, _refused(error))
        except Exception:  # a defect of ours: the agent is told in its own words, and may try again
            log.exception("%s %s failed", request.method, path)
            return _refusal(dialect, RequestRefused("a defect of the gateway", status=500, code="internal_error"))

    async def _serve(self, request: web.BaseRequest, session_id: str, path: str) -> web.StreamResponse:
        if request.headers.get(hdrs.UPGRADE, "").lower() == "websocket":
            raise RequestRefused("no WebSocket here; use POST", status=426, code="upgrade_required")
        if request.method == hdrs.METH_HEAD:
            return web.Response()
        found = route(request.method, path) if request.path.startswith("/s/") else None
        if found is None:
            raise RequestRefused(f"there is no {request.method} {request.path}", status=404, code="not_found")
        session = await self._admit(request, session_id)
        self._door.admit(request.protocol)
        if session.requests >= self._limits.requests_per_session:
            raise too_many("requests")
        if not session.spend(self._limits.requests_per_s, self._limits.request_burst):
            raise RequestRefused("too many requests of this session", status=429, code="rate_limit_exceeded")
        if found.action == "models":
            return _json(listing(self._models))
        session.requests += 1
        try:
            asked, digest = await self._asked(request, session, found.dialect, path)
            if found.action == "count":
                return _json(found.dialect.counted(await self._calls.count(session, asked)))
            return await self._call(request, session, found.dialect, asked, digest)
        finally:
            session.requests -= 1

    async def _admit(self, request: web.BaseRequest, session_id: str) -> Session:
        key = _key(request)
        if self.takeover is not None and self._sessions.get(session_id) is None:
            if self.takeover.knows(session_id, key):
                # A session may take longer to come here than a stranger may stand in the door.
                self._door.admit(request.protocol)
            await self.takeover.admit(session_id, key)
        return self._sessions.admit(session_id, key)

    async def _asked(
        self, request: web.BaseRequest, session: Session, dialect: Dialect, path: str
    ) -> tuple[ModelCall, bytes]:
        """The request as a model call, and a digest of its body apart from whether it is streamed."""
        held = 0
        try:
            async with asyncio.timeout(self._limits.body_s):
                body = bytearray()
                async for piece in request.content.iter_any():
                    body += piece
                    held += len(piece)
                    session.body_bytes += len(piece)
                    self._check_body(session, len(body))
            asked = dialect.read(bytes(body), path)
        except TimeoutError as error:
            raise RequestRefused("the request body did not arrive in time", status=408) from error
        finally:
            session.body_bytes -= held
        asked = msgspec.structs.replace(asked, thread=named_thread(request.headers))
        return asked, _digest(body)

    def _check_body(self, session: Session, size: int) -> None:
        if size > self._limits.body_bytes:
            raise RequestRefused(f"the body is larger than {self._limits.body_bytes} bytes", status=413)
        if session.body_bytes > self._limits.session_body_bytes:
            raise too_many("bytes")

    async def _call(
        self, request: web.BaseRequest, session: Session, dialect: Dialect, asked: ModelCall, digest: bytes
    ) -> web.StreamResponse:
        call = await self._calls.begin(session, asked, digest, retry=_is_retry(request))
        async with call:
            if asked.stream:
                return await self._stream(request, dialect, call, asked)
            reply = _whole(call, await asyncio.shield(call.result))
            response = _json(dialect.reply(asked, reply))
            await response.prepare(request)
            await response.write_eof()
            call.delivered = True
        return response

    async def _stream(
        self, request: web.BaseRequest, dialect: Dialect, call: Call, asked: ModelCall
    ) -> web.StreamResponse:
        response = _Events(headers=_SSE)
        await response.prepare(request)
        events = dialect.stream(asked, call.turn_id, call.prompt.tokens)
        await self._in_time(response.write(events.start()))
        try:
            shown = await self._deltas(response, call, events)
            ending = events.end(_whole(call, call.result.result()), shown)
        except RequestRefused as error:
            ending = events.failed(error)
        except KatError as error:
            ending = events.failed(_refused(error))
        await self._in_time(response.write_eof(ending))
        call.delivered = True
        return response

    async def _deltas(self, response: web.StreamResponse, call: Call, events: ReplyStream) -> Shown:
        """Show what is certain until the call has its result; how much was shown."""
        text = StreamText(
            self._calls.renderer,
            self._calls.parser_for(call.asked),
            call.asked.stop,
            thinks=self._calls.renderer.thinks,
            opened=call.prompt.opened,
        )
        known = 0
        while not call.result.done():
            if not await call.wait_for_news(known, self._limits.keepalive_s):
                await self._in_time(response.write(KEEPALIVE))
                continue
            ids = call.sampler.draft.ids
            known = max(known, len(ids))
            reasoning, content = text.feed(ids)
            if reasoning:
                await self._in_time(response.write(events.reasoning(reasoning)))
            if content:
                await self._in_time(response.write(events.text(content)))
        return text.shown

    async def _in_time(self, writing: Awaitable[None]) -> None:
        try:
            async with asyncio.timeout(self._limits.write_s):
                await writing
        except TimeoutError as error:
            raise DeadlineExceeded("the client to take its stream", self._limits.write_s) from error


class _Events(web.StreamResponse):
    """A stream whose head goes with its first event: a packet and a call of the system less."""

    _send_headers_immediately = False


def _digest(body: bytearray) -> bytes:
    """16 bytes that are equal for a body and its repetition: some clients repeat a broken stream as a whole request."""
    digest, at, key = blake2b(digest_size=16), 0, -1
    while (key := body.find(_KEY, key + 1)) >= 0:  # many times faster through a long body than an expression
        if (found := _STREAM.match(body, key)) is not None:
            digest.update(body[at:key].rstrip().removesuffix(b","))
            at = found.end()
    digest.update(memoryview(body)[at:])
    return digest.digest()


def _refusal(dialect: Dialect, error: RequestRefused) -> web.Response:
    REFUSED.labels(str(error.status)).inc()
    response = _json(dialect.error(error), error.status)
    if error.status in (429, 503):
        response.headers[hdrs.RETRY_AFTER] = "1"
    return response


def _json(body: bytes, status: int = 200) -> web.Response:
    return web.Response(body=body, status=status, content_type="application/json")


def _key(request: web.BaseRequest) -> str:
    """The key, wherever the wire puts it: Authorization (OpenAI), x-api-key (Anthropic), x-goog-api-key (Google)."""
    scheme, _, key = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
    if scheme.lower() == "bearer":
        return key.strip()
    return next((request.headers[name] for name in _KEYS if name in request.headers), "")


def _is_retry(request: web.BaseRequest) -> bool:
    return request.headers.get("x-stainless-retry-count", "0") not in ("", "0")


def _whole(call: Call, reply: Reply) -> Reply:
    """A reply that came to its own end; a call that was aborted under its client has none."""
    if reply.finish_reason == "abort":
        raise ended(call.session)
    return reply


def _refused(error: KatError) -> RequestRefused:
    """Trouble on our side as the agent sees it: retriable, unless the engine found the request itself wrong."""
    if isinstance(error, EngineRejected):
        return RequestRefused(str(error), code="engine_rejected")
    return RequestRefused(f"{type(error).__name__}: {error}", status=503, code="unavailable")
