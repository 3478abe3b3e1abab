"""The listener for workers: open and close sessions, look at them, health and metrics. Never reachable from a sandbox.

Invariant: closing is idempotent; the turns it hands over are all that the log acknowledged for the session.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from kat_stream.errors import GatewayError, KatError, LogError, RequestRefused
from kat_stream.gateway.calls import CallService
from kat_stream.gateway.limits import Limits
from kat_stream.gateway.metrics import LET_GO
from kat_stream.gateway.sessions import Session, SessionHandle, SessionRequest, Sessions, ended
from kat_stream.gateway.takeover import Takeover

MSGPACK = "application/msgpack"
KEY_HEADER = "X-Session-Key"
"""By which a gateway can close a session that another one opened."""
CLOSE_S = 10.0
MAX_CLOSE_S = 600.0
SWEEP_S = 30.0


class ControlListener:
    """Serves what workers and people ask for."""

    def __init__(self, sessions: Sessions, calls: CallService, limits: Limits) -> None:
        self._sessions, self._calls, self._limits = sessions, calls, limits
        self.takeover: Takeover | None = None
        """Where sessions come from that other gateways opened."""

    def app(self) -> web.Application:
        app = web.Application(client_max_size=self._limits.body_bytes)
        app.router.add_post("/sessions", self._open)
        app.router.add_get("/sessions", self._list)
        app.router.add_post("/sessions/{id}/close", self._close)
        app.router.add_post("/sessions/{id}/release", self._release)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        return app

    async def sweep(self) -> None:
        """Close sessions whose worker forgot them, for ever."""
        while True:
            await asyncio.sleep(min(SWEEP_S, self._limits.idle_s))
            await asyncio.gather(*(self._end(session, CLOSE_S) for session in self._sessions.idle()))

    async def _open(self, request: web.Request) -> web.Response:
        body = await request.read()
        decode = msgspec.msgpack.decode if request.content_type == MSGPACK else msgspec.json.decode
        try:
            about = decode(body, type=SessionRequest)
            session = await self.takeover.open(about) if self.takeover else self._sessions.open(about)
        except msgspec.DecodeError as error:
            return _error(400, f"POST /sessions: {error}")
        except RequestRefused as error:
            return _error(error.status, str(error))
        except LogError as error:
            return _error(503, str(error))
        return _answer(SessionHandle(session_id=session.session_id, key=session.key, path=f"/s/{session.session_id}"))

    async def _close(self, request: web.Request) -> web.Response:
        try:
            deadline_s = float(request.query.get("deadline_s", CLOSE_S))
            session = await self._known(request.match_info["id"], request.headers.get(KEY_HEADER, ""))
        except ValueError:
            return _error(400, f"deadline_s: not a number: {request.query['deadline_s']!r}")
        except RequestRefused as error:
            return _error(error.status, str(error))
        except GatewayError as error:
            return _error(404, str(error))
        except KatError as error:
            return _error(503, f"{type(error).__name__}: {error}")
        await self._end(session, min(max(deadline_s, 0.0), MAX_CLOSE_S))
        if session.moved:  # this process stood still meanwhile
            return _error(503, str(ended(session)))
        turns = sorted(session.turns, key=lambda turn: turn.index)
        return web.Response(body=msgspec.msgpack.encode(turns), content_type=MSGPACK)

    async def _known(self, session_id: str, key: str) -> Session:
        if self.takeover is not None:
            self._calls.pulse.wake(self.takeover.forget)
            if self._sessions.get(session_id) is None:
                await self.takeover.admit(session_id, key)
        return self._sessions.find(session_id)

    async def _release(self, request: web.Request) -> web.Response:
        """Another gateway is asked for a session: this one lets it go, with all that became of it on the log."""
        session_id = request.match_info["id"]
        if self.takeover is not None:
            await self.takeover.stand_back(session_id)
        if (session := self._sessions.get(session_id)) is not None:
            session.moved = session.moved or not session.closed
            await self._calls.finish_session(session, CLOSE_S / 2)
            if session.moved:
                self._sessions.drop(session)
                LET_GO.labels("moved").inc()
            else:  # its worker ends it, or has
                await self._end(session, 0.0)
        return web.Response()

    async def _end(self, session: Session, deadline_s: float) -> None:
        """Also while another gateway asks for it: that one finds it ended."""
        session.moved = False
        await self._calls.finish_session(session, deadline_s)
        if self.takeover is not None and not self._sessions.has_ended(session.session_id):
            await self.takeover.end(session)
        self._sessions.retire(session)

    async def _list(self, _request: web.Request) -> web.Response:
        return _answer([session.status() for session in self._sessions.open_ones()])

    async def _health(self, _request: web.Request) -> web.Response:
        return _answer({"status": "ok", "sessions": len(self._sessions.open_ones())})

    async def _metrics(self, _request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})


def _answer(value: Any) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")


def _error(status: int, message: str) -> web.Response:
    body = msgspec.json.encode({"error": {"message": message}})
    return web.Response(body=body, status=status, content_type="application/json")
