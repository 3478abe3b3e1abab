"""Gateway: the LLM proxy that agents talk to, as a service; every model call becomes a turn on the log.

In:      HTTP from agents (gateway.port) and from workers (gateway.control_port)
Out:     turns, each acknowledged before its reply ends
Key:     group_id
Commits: -
Fails:   a port in use or a policy without a tokenizer stops the run with the reason
"""

from __future__ import annotations

import logging

from kat_stream.gateway.app import start_gateway
from kat_stream.policy import load_tokenizer
from kat_stream.routing import Router
from kat_stream.service import Context

log = logging.getLogger(__name__)


class Gateway:
    async def run(self, ctx: Context) -> None:
        tokenizer = load_tokenizer(ctx.config.policy.model)
        async with Router(ctx.engine_urls) as router:
            server = await start_gateway(
                tokenizer=tokenizer,
                log=ctx.log,
                router=router,
                config=ctx.config.gateway,
                model_name=ctx.config.policy.name,
            )
            log.info("gateway for agents at %s, for workers at %s", server.data_url, server.control_url)
            try:
                await ctx.stopping.wait()
            finally:
                await server.close()
