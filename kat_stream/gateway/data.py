"""The listener for agents: session in the path, its secret as the API key, one handler for every path.

Invariant: nothing that opens, closes or shows other sessions can be reached from here, and every answer is in the
dialect's shape, errors included.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from hashlib import blake2b

from aiohttp import hdrs, web

from kat_stream.errors import DeadlineExceeded, EngineRejected, KatError, RequestRefused
from kat_stream.gateway.calls import Call, CallService, too_many
from kat_stream.gateway.dialects import ChatCompletions, Dialect
from kat_stream.gateway.limits import Limits
from kat_stream.gateway.messages import Reply
from kat_stream.gateway.metrics import REFUSED
from kat_stream.gateway.sessions import Session, Sessions
from kat_stream.gateway.stream_text import StreamText

KEEPALIVE = b": keepalive\n\n"
_SSE = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}


class DataListener:
    """Serves what agents ask for."""

    def __init__(self, sessions: Sessions, calls: CallService, model_name: str, limits: Limits) -> None:
        self._sessions, self._calls, self._model, self._limits = sessions, calls, model_name, limits
        self._chat: Dialect = ChatCompletions()

    def app(self) -> web.Application:
        app = web.Application(client_max_size=self._limits.body_bytes)
        app.router.add_route("*", "/{tail:.*}", self.handle)
        return app

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Any request. Errors become answers; a client that goes away cancels this, not the call it watched."""
        try:
            return await self._serve(request)
        except RequestRefused as error:
            return self._refusal(error)
        except KatError as error:
            return self._refusal(_refused(error))
        except web.HTTPRequestEntityTooLarge:
            limit = self._limits.body_bytes
            return self._refusal(RequestRefused(f"the body is larger than {limit} bytes", status=413))

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get(hdrs.UPGRADE, "").lower() == "websocket":
            raise RequestRefused("no WebSocket here; use POST", status=426, code="upgrade_required")
        if request.method == hdrs.METH_HEAD:
            return web.Response()
        _, _, rest = request.path.partition("/s/")
        session_id, _, path = rest.partition("/")
        handler = self._handlers().get((request.method, path))
        if not request.path.startswith("/s/") or handler is None:
            raise RequestRefused(f"there is no {request.method} {request.path}", status=404, code="not_found")
        session = self._sessions.admit(session_id, _key(request))
        if session.requests >= self._limits.requests_per_session:
            raise too_many("requests")
        session.requests += 1
        try:
            return await handler(request, session)
        finally:
            session.requests -= 1

    def _handlers(self) -> dict[tuple[str, str], Callable[[web.Request, Session], Awaitable[web.StreamResponse]]]:
        return {
            (hdrs.METH_POST, "v1/chat/completions"): self._completions,
            (hdrs.METH_GET, "v1/models"): self._models,
        }

    async def _models(self, _request: web.Request, _session: Session) -> web.StreamResponse:
        return _json(self._chat.models(self._model))

    async def _completions(self, request: web.Request, session: Session) -> web.StreamResponse:
        body = await self._body(request)
        asked = self._chat.read(body)
        digest = blake2b(body, digest_size=16).digest()
        call = self._calls.begin(session, asked, digest, retry=_is_retry(request))
        async with call:
            if asked.stream:
                return await self._stream(request, call)
            reply = _whole(await asyncio.shield(call.result))
        return _json(self._chat.reply(asked, reply))

    async def _body(self, request: web.Request) -> bytes:
        try:
            async with asyncio.timeout(self._limits.body_s):
                return await request.read()
        except TimeoutError as error:
            raise RequestRefused("the request body did not arrive in time", status=408) from error

    async def _stream(self, request: web.Request, call: Call) -> web.StreamResponse:
        response = web.StreamResponse(headers=_SSE)
        await response.prepare(request)
        events = self._chat.stream(call.asked, call.turn_id)
        await self._write(response, events.start())
        try:
            shown = await self._deltas(response, call, events.text)
            ending = events.end(_whole(call.result.result()), shown)
        except RequestRefused as error:
            ending = events.failed(error)
        except KatError as error:
            ending = events.failed(_refused(error))
        await self._write(response, ending)
        return response

    async def _deltas(self, response: web.StreamResponse, call: Call, event: Callable[[str], bytes]) -> int:
        """Show what is certain until the call has its result; the number of characters shown."""
        parser = self._calls.parser if call.asked.tools_allowed else None
        text = StreamText(self._calls.renderer, parser.opening if parser else "", call.asked.stop)
        known = 0
        while not call.result.done():
            if not await call.wait_for_news(known, self._limits.keepalive_s):
                await self._write(response, KEEPALIVE)
                continue
            ids = call.sampler.draft.ids
            known = max(known, len(ids))
            if delta := text.feed(ids):
                await self._write(response, event(delta))
        return text.shown

    async def _write(self, response: web.StreamResponse, data: bytes) -> None:
        try:
            async with asyncio.timeout(self._limits.write_s):
                await response.write(data)
        except TimeoutError as error:
            raise DeadlineExceeded("the client to take its stream", self._limits.write_s) from error

    def _refusal(self, error: RequestRefused) -> web.Response:
        REFUSED.labels(str(error.status)).inc()
        response = _json(self._chat.error(error), error.status)
        if error.status in (429, 503):
            response.headers[hdrs.RETRY_AFTER] = "1"
        return response


def _json(body: bytes, status: int = 200) -> web.Response:
    return web.Response(body=body, status=status, content_type="application/json")


def _key(request: web.Request) -> str:
    scheme, _, key = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")


def _is_retry(request: web.Request) -> bool:
    return request.headers.get("x-stainless-retry-count", "0") not in ("", "0")


def _whole(reply: Reply) -> Reply:
    """A reply that came to its own end; a call that was aborted under its client has none."""
    if reply.finish_reason == "abort":
        raise RequestRefused("this session has ended", status=409, code="session_ended")
    return reply


def _refused(error: KatError) -> RequestRefused:
    """Trouble on our side as the agent sees it: retriable, unless the engine found the request itself wrong."""
    if isinstance(error, EngineRejected):
        return RequestRefused(str(error), code="engine_rejected")
    return RequestRefused(f"{type(error).__name__}: {error}", status=503, code="unavailable")
