"""Gateway: the LLM proxy that agents talk to, as a service; every model call becomes a turn on the log.

In:      HTTP from agents (gateway.port) and from workers (gateway.control_port); turns, of sessions that move here
Out:     turns, each acknowledged before its reply ends
Key:     group_id
Commits: -
Fails:   a port in use or a policy without a tokenizer stops the run with the reason
"""

from __future__ import annotations

import gc
import logging

import aiohttp
import msgspec

from kat_stream.config import GatewaySection
from kat_stream.errors import ConfigError
from kat_stream.gateway.app import Moving, start_gateway
from kat_stream.gateway.client import GatewayControl
from kat_stream.gateway.peers import Peers
from kat_stream.gateway.tickets import run_secret
from kat_stream.policy import load_tokenizer
from kat_stream.routing import Router
from kat_stream.service import Context

log = logging.getLogger(__name__)


class Gateway:
    async def run(self, ctx: Context) -> None:
        tokenizer = load_tokenizer(ctx.config.policy.model)
        others = [url for number, url in enumerate(ctx.gateway_control_urls) if number != ctx.number]
        routing = ctx.config.engine.record_routing
        async with Router(ctx.engine_urls, record_routing=routing) as router, aiohttp.ClientSession() as http:
            server = await start_gateway(
                tokenizer=tokenizer,
                log=ctx.log,
                router=router,
                config=_own(ctx.config.gateway, ctx.number),
                model_name=ctx.config.policy.name,
                moving=Moving(ctx.log, run_secret(ctx.run_dir), Peers([GatewayControl(url, http) for url in others])),
            )
            settle()
            log.info("gateway for agents at %s, for workers at %s", server.data_url, server.control_url)
            try:
                await ctx.stopping.wait()
            finally:
                await server.close()


def settle() -> None:
    """What was loaded until now stays: each search for garbage in it would stop all calls for a fifth of a second."""
    gc.collect()
    gc.freeze()


def _own(section: GatewaySection, number: int) -> GatewaySection:
    """The section with the ports of this process; ConfigError if there are none."""
    ports = ((section.port, section.control_port), *section.more)
    if number >= len(ports):
        raise ConfigError(f"gateway.more: no ports for gateway {number + 1}, there are {len(ports)}")
    port, control_port = ports[number]
    return msgspec.structs.replace(section, port=port, control_port=control_port)
