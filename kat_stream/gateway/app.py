"""The gateway as a whole: two listeners on two ports, one for agents and one for workers.

Invariant: the ports are different sockets, so that who can reach the one cannot reach the other; closing ends every
call and leaves no task behind.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiohttp import web

from kat_stream.config import GatewaySection
from kat_stream.errors import ConfigError
from kat_stream.gateway.calls import CallService
from kat_stream.gateway.client import GatewayControl
from kat_stream.gateway.control import ControlListener
from kat_stream.gateway.data import DataListener
from kat_stream.gateway.limits import Limits
from kat_stream.gateway.recording import Publisher
from kat_stream.gateway.render import Renderer
from kat_stream.gateway.sessions import SessionHandle, Sessions
from kat_stream.routing.router import Router

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["GatewayControl", "GatewayServer", "SessionHandle", "start_gateway"]


@dataclass(slots=True, eq=False)
class GatewayServer:
    """A running gateway. `data_url` is for agents, `control_url` for workers."""

    data_url: str
    control_url: str
    _calls: CallService
    _runners: tuple[web.AppRunner, ...]
    _sweeper: asyncio.Task[None]

    async def close(self) -> None:
        """Stop listening and cancel what runs; sessions are gone."""
        self._sweeper.cancel()
        await asyncio.wait({self._sweeper}, timeout=1.0)
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
) -> GatewayServer:
    """Listen at `config.host`; port 0 lets the system choose. ConfigError: a port in use, an unusable chat template."""
    limits = limits or Limits()
    sessions = Sessions(limits)
    calls = CallService(Renderer(tokenizer), log, router, config.tools, limits)
    control = ControlListener(sessions, calls, limits)
    data_runner, data_url = await _listen(
        DataListener(sessions, calls, model_name, limits).app(), config.host, config.port, "gateway.port"
    )
    try:
        control_runner, control_url = await _listen(
            control.app(), config.host, config.control_port, "gateway.control_port"
        )
    except ConfigError:
        await data_runner.cleanup()
        raise
    sweeper = asyncio.create_task(control.sweep())
    return GatewayServer(data_url, control_url, calls, (data_runner, control_runner), sweeper)


async def _listen(app: web.Application, host: str, port: int, key: str) -> tuple[web.AppRunner, str]:
    # A handler whose client went away is cancelled: that is how a call learns that nobody watches it.
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
    await runner.setup()
    site = web.TCPSite(runner, host, port)
    try:
        await site.start()
    except OSError as error:
        await runner.cleanup()
        raise ConfigError(f"{key}: {host}:{port} cannot be used ({error.strerror})") from error
    return runner, f"http://{host}:{runner.addresses[0][1]}"
