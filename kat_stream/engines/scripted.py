"""A deterministic engine: a function from prompt ids to output ids, behind the SGLang HTTP contract.

For tests and rehearsals of everything that stands in front of a model, without a model. It is a real HTTP server:
streaming, abort, pause and weight versions behave as research/routing_streaming.md C1 and C2 describe.
Invariant: what it answers is what the function gave, cut at `max_new_tokens`; each token's log-probability is
`-0.125 * (1 + id % 8)`, so that a reader can check alignment.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
from aiohttp import web

ScriptedPolicy = Callable[[list[int]], list[int]]
_BODY_BYTES = 64 * 1024 * 1024
_PAUSED_S = 0.005
"""How often a paused request looks whether it may go on, or was aborted."""


def scripted_logprob(token: int) -> float:
    """The log-probability this engine claims for a token; exact in float32."""
    return -0.125 * (1 + token % 8)


class _Sampling(msgspec.Struct):
    max_new_tokens: int = 128
    temperature: float = 1.0
    stop_token_ids: list[int] = []
    stream_interval: int = 1


class _Body(msgspec.Struct):
    input_ids: list[int]
    rid: str = ""
    sampling_params: _Sampling = msgspec.field(default_factory=_Sampling)
    stream: bool = False


@dataclass(slots=True, eq=False)
class _Running:
    body: _Body
    planned: list[int]
    version: str
    transport: asyncio.Transport | None
    done: list[int] = field(default_factory=list)
    finish: dict[str, Any] | None = None

    def answer(self) -> dict[str, Any]:
        count = len(self.done)
        return {
            "text": "",
            "output_ids": self.done,
            "meta_info": {
                "id": self.body.rid,
                "finish_reason": self.finish,
                "prompt_tokens": len(self.body.input_ids),
                "completion_tokens": count,
                "cached_tokens": 0,
                "weight_version": self.version,
                "weight_versions": [{"version": self.version, "start": 0, "end": count}],
                "output_token_logprobs": [[scripted_logprob(token), token, None] for token in self.done],
            },
        }


class ScriptedEngine:
    """`url` to reach it; `requests` as it saw them; `token_s`: seconds that each token takes."""

    def __init__(self, policy: ScriptedPolicy, token_s: float, version: str) -> None:
        self.policy, self.token_s, self.version = policy, token_s, version
        self.requests: list[_Body] = []
        self.aborted: list[str] = []
        self.url = ""
        self._running: dict[str, _Running] = {}
        self._going = asyncio.Event()
        self._going.set()
        self._runner: web.AppRunner | None = None

    @property
    def in_flight(self) -> int:
        """Requests being answered now."""
        return len(self._running)

    async def start(self) -> None:
        app = web.Application(client_max_size=_BODY_BYTES)
        app.router.add_post("/generate", self._generate)
        app.router.add_post("/abort_request", self._abort)
        app.router.add_post("/pause_generation", self._pause)
        app.router.add_post("/continue_generation", self._continue)
        app.router.add_get("/v1/loads", self._loads)
        app.router.add_get("/model_info", self._info)
        app.router.add_get("/health", self._health)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = site.name

    async def close(self) -> None:
        """Stop as a killed process does: open connections break."""
        for running in self._running.values():
            if running.transport is not None:
                running.transport.abort()
        if self._runner is not None:
            await self._runner.cleanup()

    def progress(self) -> list[int]:
        """Tokens sampled so far by each running request."""
        return [len(running.done) for running in self._running.values()]

    def abort(self, rid: str = "") -> None:
        """End requests whose id starts with `rid`: they answer with what they have."""
        for running in list(self._running.values()):
            if running.body.rid.startswith(rid):
                self.aborted.append(running.body.rid)
                running.finish = {"type": "abort", "message": "aborted"}

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = msgspec.json.decode(await request.read(), type=_Body)
        if body.rid in self._running:
            return web.json_response({"error": {"message": f"duplicate request id {body.rid}"}}, status=400)
        self.requests.append(body)
        running = _Running(body, self.policy(body.input_ids), self.version, request.transport)
        self._running[body.rid] = running
        try:
            return await (self._stream(request, running) if body.stream else self._whole(running))
        finally:
            del self._running[body.rid]

    async def _whole(self, running: _Running) -> web.Response:
        while running.finish is None:
            await self._step(running)
        return web.Response(body=msgspec.json.encode(running.answer()), content_type="application/json")

    async def _stream(self, request: web.Request, running: _Running) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        while running.finish is None:
            await self._step(running)
            if running.finish is None and (len(running.done) - 1) % running.body.sampling_params.stream_interval:
                continue
            await response.write(b"data: " + msgspec.json.encode(running.answer()) + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _step(self, running: _Running) -> None:
        """Sample the next token; all at once where time does not matter."""
        take = 1 if self.token_s else len(running.planned)
        if self.token_s:
            await asyncio.sleep(self.token_s)
        while not self._going.is_set() and running.finish is None:
            await asyncio.sleep(_PAUSED_S)
        if running.finish is not None:
            return
        if not running.done:
            running.version = self.version
        limit = running.body.sampling_params.max_new_tokens
        running.done += running.planned[len(running.done) : min(len(running.done) + take, limit)]
        if len(running.done) >= len(running.planned):
            running.finish = {"type": "stop", "matched": running.done[-1] if running.done else None}
        elif len(running.done) >= limit:
            running.finish = {"type": "length", "length": limit}

    async def _abort(self, request: web.Request) -> web.Response:
        body = msgspec.json.decode(await request.read())
        self.abort("" if body.get("abort_all") else body.get("rid", ""))
        return web.Response()

    async def _pause(self, request: web.Request) -> web.Response:
        body = msgspec.json.decode(await request.read() or b"{}")
        self._going.clear()
        if body.get("mode", "abort") == "abort":
            self.abort()
        return web.json_response({"status": "ok"})

    async def _continue(self, _request: web.Request) -> web.Response:
        self._going.set()
        return web.json_response({"status": "ok"})

    async def _loads(self, _request: web.Request) -> web.Response:
        used = sum(len(running.body.input_ids) + len(running.done) for running in self._running.values())
        return web.json_response({"loads": [{"num_running_reqs": self.in_flight, "num_used_tokens": used}]})

    async def _info(self, _request: web.Request) -> web.Response:
        return web.json_response({"model_path": "scripted", "weight_version": self.version})

    async def _health(self, _request: web.Request) -> web.Response:
        return web.Response()


async def start_scripted_engine(
    policy: ScriptedPolicy, *, token_s: float = 0.0, version: str = "scripted.0"
) -> ScriptedEngine:
    """A running engine on a port of the system's choice; close it with `await engine.close()`."""
    engine = ScriptedEngine(policy, token_s, version)
    await engine.start()
    return engine
