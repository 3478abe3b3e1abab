"""Several gateways over one log and one engine, between which sessions move."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

from kat_stream.config import GatewaySection
from kat_stream.engines.scripted import ScriptedEngine, ScriptedPolicy, start_scripted_engine
from kat_stream.errors import GatewayError
from kat_stream.gateway.app import GatewayControl, GatewayServer, Moving, SessionHandle, start_gateway
from kat_stream.gateway.limits import Limits
from kat_stream.gateway.peers import Peers, Pulse
from kat_stream.log.memory import MemoryLog
from kat_stream.routing import Router
from tests.contract.gateway_kit import CHATML, tokenizer, user
from tests.contract.log_records import everything
from topics import Sampling, Turn, topic_named

SECRET = b"s" * 32
QUICK = Limits(keepalive_s=0.05, disconnect_grace_s=0.05)


class Later:
    """A peer whose address is known once it has started."""

    def __init__(self) -> None:
        self.control: GatewayControl | None = None

    async def release(self, session_id: str, *, deadline_s: float) -> None:
        if self.control is None:
            raise GatewayError("not there")
        await self.control.release(session_id, deadline_s=deadline_s)


@dataclass
class Gateways:
    """Several gateways over one log and one engine."""

    log: MemoryLog
    engine: ScriptedEngine
    http: aiohttp.ClientSession
    servers: list[GatewayServer] = field(default_factory=list)

    def control(self, number: int) -> GatewayControl:
        return GatewayControl(self.servers[number].control_url, self.http)

    async def open(self, rollout: str = "r1g1s0") -> SessionHandle:
        return await self.control(0).open(run="r1", group_id="g1", rollout_id=rollout, sampling=Sampling())

    async def post(self, number: int, handle: SessionHandle, body: dict[str, Any], **headers: str) -> tuple[int, Any]:
        url = f"{self.servers[number].data_url}{handle.path}/v1/chat/completions"
        known = {"Authorization": f"Bearer {handle.key}", **headers}
        async with self.http.post(url, json={"model": "m", **body}, headers=known) as answer:
            return answer.status, await answer.json(content_type=None)

    async def say(self, number: int, handle: SessionHandle, messages: list[Any], **more: Any) -> dict[str, Any]:
        status, body = await self.post(number, handle, {"messages": messages, **more})
        assert status == 200, body
        message: dict[str, Any] = body["choices"][0]["message"]
        return message

    async def turns(self) -> list[Turn]:
        """All that is on the log, claims included."""
        return [delivered.record() for delivered in await everything(self.log, "turns")]  # type: ignore[misc]

    async def talk(self, handle: SessionHandle, at: list[int]) -> list[dict[str, Any]]:
        """One turn at each of these gateways, in order."""
        messages: list[dict[str, Any]] = [user("go")]
        for number in at:
            said = await self.say(number, handle, messages)
            messages += [{"role": "assistant", "content": said["content"]}, user("and?")]
        return messages

    async def close_at(self, number: int, handle: SessionHandle) -> list[Turn]:
        """As the worker that opened it closes it, at another gateway."""
        url = f"{self.servers[number].control_url}/sessions/{handle.session_id}/close"
        async with self.http.post(url, headers={"X-Session-Key": handle.key}) as answer:
            raw = await answer.read()
            assert answer.status == 200, raw
            return msgspec.msgpack.decode(raw, type=list[Turn])


@asynccontextmanager
async def gateways(
    policy: ScriptedPolicy,
    *,
    number: int = 2,
    token_s: float = 0.0,
    tools: str = "none",
    template: str = CHATML,
    stall_s: float = 10.0,
    limits: Limits = QUICK,
) -> AsyncIterator[Gateways]:
    """They know each other; all is closed at the end."""
    async with AsyncExitStack() as stack:
        engine = await start_scripted_engine(policy, token_s=token_s)
        stack.push_async_callback(engine.close)
        log = MemoryLog()
        await log.apply_topics([topic_named("turns")])
        router = await stack.enter_async_context(Router([engine.url], poll_s=0.05))
        http = await stack.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
        them = Gateways(log, engine, http)
        known = [Later() for _ in range(number)]
        for own in known:
            peers = Peers([peer for peer in known if peer is not own], release_s=2.0)
            server = await start_gateway(
                tokenizer=tokenizer(template),
                log=log,
                router=router,
                config=GatewaySection(tools=tools),
                model_name="policy",
                limits=limits,
                moving=Moving(log, SECRET, peers, Pulse(stall_s)),
            )
            own.control = GatewayControl(server.control_url, http)
            stack.push_async_callback(server.close)
            them.servers.append(server)
        yield them
