"""The listener for agents: session in the path, its secret as the API key, one handler for every path.

Invariant: nothing that opens, closes or shows other sessions can be reached from here, and every answer is in the
dialect's shape, errors included. Behind the head of a stream comes the rest of that stream and nothing else: what fails
there ends it in its own words, and a client that does not take it is cut off.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable
from hashlib import blake2b

import msgspec
from aiohttp import hdrs, web

from kat_stream.errors import EngineRejected, KatError, RequestRefused
from kat_stream.gateway.calls import Call, CallService, too_many
from kat_stream.gateway.dialects import CHAT, Dialect, ReplyStream, listing, route, spoken_at
from kat_stream.gateway.door import Door
from kat_stream.gateway.limits import Limits
from kat_stream.gateway.messages import ModelCall, Reply
from kat_stream.gateway.metrics import REFUSED
from kat_stream.gateway.sessions import Session, Sessions, ended, over
from kat_stream.gateway.side import SUFFIX
from kat_stream.gateway.stream_text import Shown, StreamText
from kat_stream.gateway.takeover import Takeover
from kat_stream.gateway.threads import named_thread

log = logging.getLogger(__name__)

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
            return _refusal(dialect, _defect())

    async def _serve(self, request: web.BaseRequest, session_id: str, path: str) -> web.StreamResponse:
        if request.headers.get(hdrs.UPGRADE, "").lower() == "websocket":
            raise RequestRefused("no WebSocket here; use POST", status=426, code="upgrade_required")
        if request.method == hdrs.METH_HEAD:
            return web.Response()
        found = route(request.method, path) if request.path.startswith("/s/") else None
        if found is None:
            raise RequestRefused(f"there is no {request.method} {request.path}", status=404, code="not_found")
        session = await self._admit(request, session_id)
        self._door.admit(request.protocol, session_id)
        if session.requests >= self._limits.requests_per_session:
            raise too_many("requests")
        if not session.spend(self._limits.requests_per_s, self._limits.request_burst):
            raise RequestRefused("too many requests of this session", status=429, code="rate_limit_exceeded")
        if found.action == "models":
            return _json(listing(self._models))
        session.requests += 1
        room = _Room(session, self._limits)
        try:
            asked, digest = await self._asked(request, room, found.dialect, path)
            if found.action == "count":
                return _json(found.dialect.counted(await self._calls.count(session, asked)))
            call = await self._calls.begin(session, asked, digest, retry=_is_retry(request))
            room.leave()
            return await self._call(request, found.dialect, call, asked)
        finally:
            room.leave()
            session.requests -= 1

    async def _admit(self, request: web.BaseRequest, session_id: str) -> Session:
        key = _key(request)
        if self.takeover is not None and self._sessions.get(session_id) is None:
            if self.takeover.knows(session_id, key):
                if self._sessions.has_ended(session_id):
                    raise over()
                # A session may take longer to come here than a stranger may stand in the door.
                self._door.admit(request.protocol, session_id)
            await self.takeover.admit(session_id, key)
        return self._sessions.admit(session_id, key)

    async def _asked(
        self, request: web.BaseRequest, room: _Room, dialect: Dialect, path: str
    ) -> tuple[ModelCall, bytes]:
        """The request as a model call, and a digest of its body apart from whether it is streamed."""
        # A body that came with its head has nothing to wait for: it needs no timer.
        comes = not request.content.is_eof()
        try:
            async with asyncio.timeout(self._limits.body_s if comes else None):
                if comes and request.headers.get(hdrs.EXPECT, "").lower() == "100-continue":
                    await _go_on(request)
                body = bytearray()
                async for piece in request.content.iter_any():
                    body += piece
                    room.take(len(piece))
            asked = dialect.read(bytes(body), path)
        except TimeoutError as error:
            raise RequestRefused("the request body did not arrive in time", status=408) from error
        except web.RequestPayloadError as error:
            raise RequestRefused(f"the request body cannot be read: {error}") from error
        asked = msgspec.structs.replace(asked, thread=named_thread(request.headers))
        return asked, _digest(body)

    async def _call(
        self, request: web.BaseRequest, dialect: Dialect, call: Call, asked: ModelCall
    ) -> web.StreamResponse:
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
        response.held = events.start()
        try:
            ending = await self._ending(response, call, events)
            await self._in_time(response.write_eof(response.all_with(ending)))
            call.delivered = True
        except ConnectionError:  # the client went away, or takes nothing: there is nobody to answer
            if request.transport is not None:
                request.transport.abort()
        return response

    async def _ending(self, response: _Events, call: Call, events: ReplyStream) -> bytes:
        """What ends a stream, when all before it was shown. ConnectionError: the client does not take it."""
        try:
            shown = await self._deltas(response, call, events)
            return events.end(_whole(call, call.result.result()), shown)
        except RequestRefused as error:
            return events.failed(error)
        except KatError as error:
            return events.failed(_refused(error))
        except ConnectionError:
            raise
        except Exception:  # a defect of ours: the head is out, so the agent is told in the stream, and may try again
            log.exception("the stream of turn %s failed", call.turn_id)
            return events.failed(_defect())

    async def _deltas(self, response: _Events, call: Call, events: ReplyStream) -> Shown:
        """Show what is certain until the call has its result; how much was shown."""
        text = StreamText(
            self._calls.renderer,
            self._calls.parser_for(call.asked),
            call.asked.stop,
            thinks=self._calls.renderer.thinks,
            opened=call.prompt.opened,
        )
        known, silent_at = 0, time.monotonic() + self._limits.keepalive_s
        while True:
            await call.wait_for_news(known, silent_at - time.monotonic())
            if call.result.done():  # what is left goes with the end
                return text.shown
            ids = call.sampler.draft.ids
            known = max(known, len(ids))
            reasoning, content = text.feed(ids)
            piece = (events.reasoning(reasoning) if reasoning else b"") + (events.text(content) if content else b"")
            # A reply may grow unseen for long: a tool call is shown when it is whole.
            if not piece and time.monotonic() >= silent_at:
                piece = events.alive
            if piece:
                await self._in_time(response.write(response.all_with(piece)))
                silent_at = time.monotonic() + self._limits.keepalive_s

    async def _in_time(self, writing: Awaitable[None]) -> None:
        try:
            async with asyncio.timeout(self._limits.write_s):
                await writing
        except TimeoutError as error:
            raise ConnectionAbortedError(f"the client took nothing for {self._limits.write_s:g} s") from error


class _Room:
    """What a request holds of its session's bytes: from its first one until its call has begun, or it is answered."""

    def __init__(self, session: Session, limits: Limits) -> None:
        self._session, self._limits = session, limits
        self._held = 0

    def take(self, size: int) -> None:
        """For the next piece of the body. RequestRefused: this body is too large, or all of the session's are."""
        self._held += size
        self._session.body_bytes += size
        if self._held > self._limits.body_bytes:
            raise RequestRefused(f"the body is larger than {self._limits.body_bytes} bytes", status=413)
        if self._session.body_bytes > self._limits.session_body_bytes:
            raise too_many("bytes")

    def leave(self) -> None:
        """It holds nothing more."""
        self._session.body_bytes -= self._held
        self._held = 0


class _Events(web.StreamResponse):
    """A stream whose head and start go with the first event that says something: fewer packets and calls of the system.

    A reply that takes long to begin gets them with its first sign of life.
    """

    _send_headers_immediately = False
    held = b""
    """What goes before the next piece."""

    def all_with(self, piece: bytes) -> bytes:
        """The piece behind what was held."""
        whole, self.held = self.held + piece, b""
        return whole


async def _go_on(request: web.BaseRequest) -> None:
    """Tell a client that sends its body only when it is told to."""
    writer = request.writer
    await writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    writer.output_size = 0  # the answer itself has not begun


def _digest(body: bytearray) -> bytes:
    """16 bytes that are equal for a body and its repetition: some clients repeat a broken stream as a whole request."""
    digest, at, key = blake2b(digest_size=16), 0, -1
    while (key := body.find(_KEY, key + 1)) >= 0:  # many times faster through a long body than an expression
        if (found := _STREAM.match(body, key)) is not None:
            digest.update(body[at:key].rstrip().removesuffix(b","))
            at = found.end()
    digest.update(memoryview(body)[at:])
    return digest.digest()


def _defect() -> RequestRefused:
    return RequestRefused("a defect of the gateway", status=500, code="internal_error")


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
