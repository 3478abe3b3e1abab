"""The door of the agents' port: how many connections there are, and how long a stranger may stand in it.

Invariant: a connection that has shown a session's key is never closed for another session's sake, and of one session
there are at most `session_connections`; one that has not is closed after `headers_s`, or earlier when there are too
many, the oldest first. So who floods the port shuts out only himself, with a key and without.
"""

from __future__ import annotations

import asyncio
import time

from aiohttp import web

from kat_stream.gateway.limits import Limits
from kat_stream.gateway.metrics import TURNED_AWAY


class Door:
    """Makes the protocols of new connections; `admit` when a request showed a session's key."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._strangers: dict[asyncio.BaseProtocol, float] = {}
        self._known: dict[str, list[asyncio.BaseProtocol]] = {}
        """Of each session, the oldest first; some are gone already."""

    def admit(self, protocol: asyncio.BaseProtocol, session_id: str) -> None:
        """A request showed this session's key; of too many connections that did so first the oldest is closed."""
        if self._strangers.pop(protocol, None) is None:
            return
        own, most = self._known.setdefault(session_id, []), self._limits.session_connections
        own.append(protocol)
        if len(own) > most and len(there := self._there(session_id)) > most:
            self._close(there[0], "session")

    def new(self, server: web.Server) -> asyncio.BaseProtocol:
        """The protocol of a connection that was just made."""
        if len(server.connections) >= self._limits.connections and not self._make_room():
            TURNED_AWAY.labels("full").inc()
            return _Refusal()
        protocol = server()
        self._strangers[protocol] = time.monotonic()
        return protocol

    async def watch(self) -> None:
        """Close strangers who stood too long, for ever."""
        while True:
            await asyncio.sleep(min(1.0, self._limits.headers_s / 2))
            late = time.monotonic() - self._limits.headers_s
            for protocol in [known for known, since in self._strangers.items() if since < late]:
                self._close(protocol, "silent")
            for session_id in list(self._known):
                self._there(session_id)

    def _there(self, session_id: str) -> list[asyncio.BaseProtocol]:
        """The session's connections; those that are gone are forgotten."""
        there = [protocol for protocol in self._known.pop(session_id) if _transport(protocol) is not None]
        if there:
            self._known[session_id] = there
        return there

    def _make_room(self) -> bool:
        """Close the oldest stranger that is still there; False if there is none."""
        while self._strangers:
            if self._close(next(iter(self._strangers)), "full"):
                return True
        return False

    def _close(self, protocol: asyncio.BaseProtocol, reason: str) -> bool:
        self._strangers.pop(protocol, None)
        transport = _transport(protocol)
        if transport is None:
            return False
        TURNED_AWAY.labels(reason).inc()
        transport.abort()
        return True


def _transport(protocol: asyncio.BaseProtocol) -> asyncio.Transport | None:
    """None if the connection is gone."""
    transport = getattr(protocol, "transport", None)
    return transport if isinstance(transport, asyncio.Transport) and not transport.is_closing() else None


class _Refusal(asyncio.Protocol):
    """A connection that is closed as soon as it is made."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if isinstance(transport, asyncio.Transport):
            transport.abort()
