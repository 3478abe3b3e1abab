"""The gateway as a whole: two listeners on two ports, one for agents and one for workers.

Invariant: the ports are different sockets, so that who can reach the one cannot reach the other; closing ends every
call and leaves no task behind.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from kat_stream.config import GatewaySection
from kat_stream.errors import ConfigError
from kat_stream.gateway.calls import CallService
from kat_stream.gateway.client import GatewayControl
from kat_stream.gateway.control import ControlListener
from kat_stream.gateway.data import DataListener
from kat_stream.gateway.door import Door
from kat_stream.gateway.limits import Limits
from kat_stream.gateway.peers import Peers, Pulse
from kat_stream.gateway.recording import Publisher
from kat_stream.gateway.render import Renderer
from kat_stream.gateway.sessions import SessionHandle, Sessions
from kat_stream.gateway.takeover import Takeover
from kat_stream.gateway.tickets import Mint
from kat_stream.log.base import Log
from kat_stream.routing.router import Router

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["GatewayControl", "GatewayServer", "SessionHandle", "start_gateway"]


@dataclass(frozen=True, slots=True)
class Moving:
    """What gateways of one run share: the log that they read sessions from, a secret, and each other."""

    log: Log
    secret: bytes
    peers: Peers = field(default_factory=Peers)
    pulse: Pulse = field(default_factory=Pulse)


@dataclass(slots=True, eq=False)
class GatewayServer:
    """A running gateway. `data_url` is for agents, `control_url` for workers."""

    data_url: str
    control_url: str
    _calls: CallService
    _takeover: Takeover | None
    _runners: tuple[web.BaseRunner, ...]
    _chores: tuple[asyncio.Task[None], ...]

    async def close(self) -> None:
        """Stop listening and cancel what runs; sessions are gone."""
        for chore in self._chores:
            chore.cancel()
        await asyncio.wait(self._chores, timeout=1.0)
        if self._takeover is not None:
            await self._takeover.close()
        await self._calls.close()
        for runner in self._runners:
            await runner.cleanup()


async def start_gateway(
    *,
    tokenizer: PreTrainedTokenizerFast,
    log: Publisher,
    router: Router,
    config: GatewaySection,
    model_name: str,
    limits: Limits | None = None,
    moving: Moving | None = None,
) -> GatewayServer:
    """Listen at `config.host`; port 0 lets the system choose. ConfigError: a port in use, an unusable chat template.

    `moving`: what lets sessions survive this process; without it they live and die with it.
    """
    limits = limits or Limits()
    sessions = Sessions(limits)
    calls = CallService(Renderer(tokenizer, aside=True), log, router, config.tools, limits)
    control, door = ControlListener(sessions, calls, limits), Door(limits)
    data = DataListener(sessions, calls, model_name, limits, door)
    takeover = None
    if moving is not None:
        takeover = Takeover(moving.log, sessions, calls, Mint(moving.secret), moving.peers)
        control.takeover = data.takeover = takeover
    data_runner = web.ServerRunner(web.Server(data.handle, **_how(limits)), shutdown_timeout=1.0)
    data_url = await _listen(data_runner, config.host, config.port, "gateway.port", door)
    try:
        control_runner = web.AppRunner(control.app(), shutdown_timeout=1.0, **_how(limits))
        control_url = await _listen(control_runner, config.host, config.control_port, "gateway.control_port")
    except ConfigError:
        await data_runner.cleanup()
        raise
    chores = [asyncio.create_task(control.sweep()), asyncio.create_task(door.watch())]
    if takeover is not None and moving is not None and moving.peers:
        calls.pulse = moving.pulse
        chores.append(asyncio.create_task(calls.pulse.watch(takeover.forget)))
    return GatewayServer(data_url, control_url, calls, takeover, (data_runner, control_runner), tuple(chores))


def _no_garbage(record: logging.LogRecord) -> bool:
    """What is no HTTP is answered and not logged: a key may stand in it, and much of it would fill the disk."""
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError | web.RequestPayloadError))


_http_log = logging.getLogger("kat_stream.gateway.http")
_http_log.addFilter(_no_garbage)


def _how(limits: Limits) -> dict[str, Any]:
    # A handler whose client went away is cancelled: that is how a call learns that nobody watches it.
    return {"access_log": None, "logger": _http_log, "handler_cancellation": True, "lingering_time": limits.linger_s}


async def _listen(runner: web.BaseRunner, host: str, port: int, key: str, door: Door | None = None) -> str:
    await runner.setup()
    site = web.TCPSite(runner, host, port) if door is None else _GuardedSite(runner, host, port, door)
    try:
        await site.start()
    except OSError as error:
        await runner.cleanup()
        raise ConfigError(f"{key}: {host}:{port} cannot be used ({error.strerror})") from error
    return f"http://{host}:{runner.addresses[0][1]}"


class _GuardedSite(web.TCPSite):
    """A listening socket with a door before it."""

    def __init__(self, runner: web.BaseRunner, host: str, port: int, door: Door) -> None:
        super().__init__(runner, host, port)
        self._door = door

    async def start(self) -> None:
        await web.BaseSite.start(self)
        loop, server = asyncio.get_running_loop(), self._runner.server
        assert isinstance(server, web.Server)
        self._server = await loop.create_server(lambda: self._door.new(server), self._host, self._port)
