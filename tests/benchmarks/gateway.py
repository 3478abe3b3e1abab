"""What the gateway adds to a model call: `python -m tests.benchmarks.gateway [--proxies ...] [--memory]`.

Engine, proxy and agents are processes of their own, so that CPU is the proxy's alone: HTTP server, session, template,
tokenizer, routing, HTTP client to the engine, record, in-memory log. What is added is what the same calls take longer
than with the agents straight at the engine. The tokenizer of the tests writes a token a character.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path

import aiohttp
import msgspec
from aiohttp import web

from kat_stream.engines.scripted import start_scripted_engine
from kat_stream.gateway.app import GatewayControl
from tests.benchmarks.gateway_rivals import PACKAGES, Proxy, cpu_s, resident_bytes, running
from topics import Sampling

REPLY = "cat src/config.py"
WIDE = Sampling(max_context=1 << 20, max_turns=1 << 20)
NEW = 300
"""Tokens that each turn adds."""
ENVS = Path.home() / ".cache" / "kat-stream" / "rivals"


@dataclass(frozen=True)
class Load:
    """One case: `context` tokens at the start of each session, `new` more in each turn."""

    at_once: int
    sessions: int
    turns: int
    context: int
    new: int
    stream: bool


async def _chat(request: web.Request) -> web.StreamResponse:
    """The same reply without ids: what stands behind proxies that are no gateways, and behind nothing."""
    body = msgspec.json.decode(await request.read())
    head = {"id": "c", "created": 0, "model": "m"}
    if not body.get("stream"):
        choice = {"index": 0, "message": {"role": "assistant", "content": REPLY}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 1, "completion_tokens": len(REPLY), "total_tokens": 1 + len(REPLY)}
        return web.json_response({**head, "object": "chat.completion", "choices": [choice], "usage": usage})
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for delta, finish in (({"role": "assistant", "content": REPLY}, None), ({}, "stop")):
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        event = {**head, "object": "chat.completion.chunk", "choices": [choice]}
        await response.write(b"data: " + msgspec.json.encode(event) + b"\n\n")
    await response.write(b"data: [DONE]\n\n")
    return response


async def _about(_: web.Request) -> web.Response:
    """Whatever else a router asks of its workers."""
    return web.json_response({"status": "ok", "model_path": "m", "data": [{"id": "m", "object": "model"}]})


def _engine(pipe: Connection) -> None:
    from tests.contract.gateway_kit import by_bytes  # agents do without its clients

    said = by_bytes(REPLY)

    async def serve() -> None:
        engine = await start_scripted_engine(lambda prompt: said)
        app = web.Application(client_max_size=1 << 26)
        app.router.add_post("/v1/chat/completions", _chat)
        app.router.add_get("/{tail:.*}", _about)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        pipe.send((engine.url, f"http://127.0.0.1:{runner.addresses[0][1]}"))
        await asyncio.to_thread(pipe.recv)
        await runner.cleanup()
        await engine.close()

    asyncio.run(serve())


async def _one(http: aiohttp.ClientSession, proxy: Proxy, number: int, load: Load, seconds: list[float]) -> str:
    """One session from its first call to its last; its id, if there are sessions."""
    session, url, headers = "", proxy.url, {"Authorization": "Bearer none"}
    if proxy.control_url:
        control = GatewayControl(proxy.control_url, http)
        handle = await control.open(run="b", group_id=f"g{number // 8}", rollout_id=f"r{number}", sampling=WIDE)
        session, url, headers = handle.session_id, proxy.url + handle.path, {"Authorization": f"Bearer {handle.key}"}
    messages = [{"role": "system", "content": "Mend it."}, _user(f"task {number // 8} " + "x" * load.context)]
    for _ in range(load.turns):
        body = json.dumps({"model": "m", "messages": messages, "stream": load.stream}).encode()
        headers["Content-Type"] = "application/json"
        began = time.perf_counter()
        async with http.post(f"{url}/v1/chat/completions", data=body, headers=headers) as answer:
            text = await answer.text()
            assert answer.status == 200 and REPLY.split()[0] in text, text
        seconds.append(time.perf_counter() - began)
        messages = [*messages, {"role": "assistant", "content": REPLY}, _user("y" * load.new)]
    return session


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


async def _load(proxy: Proxy, load: Load, keep: bool) -> list[float]:
    """Seconds of each call, sorted; with `keep` the sessions stay open."""
    seconds: list[float] = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        for start in range(0, load.sessions, load.at_once):
            ours = range(start, min(start + load.at_once, load.sessions))
            opened = await asyncio.gather(*(_one(http, proxy, n, load, seconds) for n in ours))
            if proxy.control_url and not keep:
                control = GatewayControl(proxy.control_url, http)
                await asyncio.gather(*(control.close(session) for session in opened))
    return sorted(seconds)


def _agents(pipe: Connection) -> None:
    while (asked := pipe.recv()) is not None:
        pipe.send(asyncio.run(_load(*asked)))


class Agents:
    """All agents, in a process of their own."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def run(self, proxy: Proxy, load: Load, *, keep: bool = False) -> list[float]:
        self._pipe.send((proxy, load, keep))
        seconds: list[float] = self._pipe.recv()
        return seconds


@contextmanager
def _process(work: Callable[[Connection], None]) -> Iterator[Connection]:
    """A process that talks through the pipe until it is sent None."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs,))
    process.start()
    try:
        yield ours
    finally:
        ours.send(None)
        process.join()


def _measure(agents: Agents, proxy: Proxy, load: Load, direct: list[float]) -> dict[str, float]:
    agents.run(proxy, replace(load, at_once=min(load.at_once, 4), sessions=min(load.at_once, 4)))
    began, wall = cpu_s(proxy.pid), time.perf_counter()
    seconds = agents.run(proxy, load)
    used, wall, calls = cpu_s(proxy.pid) - began, time.perf_counter() - wall, len(seconds)
    return {
        "calls": calls,
        "cpu_ms_a_call": round(used / calls * 1e3, 3),
        "calls_a_core_second": round(calls / used, 1) if used else 0.0,
        "p50_ms": round(_at(seconds, 0.5) * 1e3, 2),
        "p99_ms": round(_at(seconds, 0.99) * 1e3, 2),
        "added_p50_ms": round((_at(seconds, 0.5) - _at(direct, 0.5)) * 1e3, 2),
        "added_p99_ms": round((_at(seconds, 0.99) - _at(direct, 0.99)) * 1e3, 2),
        "load_average": round(os.getloadavg()[0], 1),
    }


def _at(ordered: list[float], share: float) -> float:
    return ordered[int(len(ordered) * share)]


def _memory(agents: Agents, engine_url: str, contexts: list[int], sessions: int) -> None:
    """Resident memory that a live session of the gateway adds, after some turns."""
    for context in contexts:
        with running("kat-stream", engine_url, ENVS) as proxy:
            load = Load(4, 4, 5, context, NEW, False)
            agents.run(proxy, load, keep=True)
            before = resident_bytes(proxy.pid)
            agents.run(proxy, replace(load, sessions=sessions), keep=True)
            kilobytes = (resident_bytes(proxy.pid) - before) / sessions / 1e3
        print(json.dumps({"context": context, "sessions": sessions, "kB_a_session": round(kilobytes, 1)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=800, help="of each case (fewer with long contexts)")
    parser.add_argument("--turns", type=int, default=10, help="of each session")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 32, 256], help="sessions")
    parser.add_argument("--contexts", type=int, nargs="+", default=[2_000, 20_000, 100_000], help="tokens at the start")
    parser.add_argument("--streams", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--proxies", nargs="+", default=["kat-stream"], choices=["kat-stream", *PACKAGES])
    parser.add_argument("--envs", type=Path, default=ENVS, help="where the rivals are installed")
    parser.add_argument("--memory", type=int, metavar="SESSIONS", help="measure the memory of so many instead")
    args = parser.parse_args()
    print(json.dumps({"machine": platform.machine(), "python": platform.python_version()}))
    with _process(_engine) as engine, _process(_agents) as pipe:
        agents, (url, chat_url) = Agents(pipe), engine.recv()
        if args.memory:
            _memory(agents, url, args.contexts, args.memory)
            return
        direct: dict[Load, list[float]] = {}
        for name in ("direct", *args.proxies):
            with running(name, url if name == "kat-stream" else chat_url, args.envs) as proxy:
                for at_once, tokens, stream in product(args.at_once, args.contexts, args.streams):
                    sessions = max(at_once, args.calls * 2_000 // max(tokens, 2_000) // args.turns, 2)
                    load = Load(at_once, sessions, args.turns, tokens, NEW, bool(stream))
                    if name == "direct":
                        direct[load] = agents.run(proxy, load)
                    found = _measure(agents, proxy, load, direct[load]) if name != "direct" else {}
                    print(json.dumps({"proxy": name, **asdict(load), **found}), flush=True)


if __name__ == "__main__":
    main()
