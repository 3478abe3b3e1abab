"""What the gateway adds to a model call: `python -m tests.benchmarks.gateway [--proxies ...] [--memory]`.

Engine, proxy and agents are processes of their own, so that CPU is the proxy's alone: HTTP server, session, template,
tokenizer, routing, HTTP client to the engine, record, in-memory log. What is added is what the same calls take longer
than with the agents straight at the engine. With `--rate` agents work between two calls, so many calls a second in all;
without it they call as fast as they are answered, and latency is mostly the wait for a core. Sessions are opened before
and closed after what is measured. First calls of sessions, whose whole context is new, are apart in latencies and
included in CPU. The tokenizer of the tests writes a token a character. Proxy `bare` passes calls on with the gateway's
HTTP library: its CPU says how fast the machine is at that hour.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
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
    rate: float
    """Calls a second of all sessions together; 0: none waits between two calls."""

    def work_s(self) -> float:
        """How long an agent works before its next call, on average as long as `rate` wants."""
        return random.uniform(0, 2 * self.at_once / self.rate) if self.rate else 0.0


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
        def policy(_prompt: list[int]) -> list[int]:
            engine.requests.clear()  # or it would keep every prompt
            return said

        engine = await start_scripted_engine(policy)
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


@dataclass
class Seconds:
    """How long calls took: the first ones of sessions, and the others."""

    first: list[float] = field(default_factory=list)
    later: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.first) + len(self.later)


@dataclass(frozen=True)
class Door:
    """Where an agent calls and its key; `session` is empty where there are none."""

    url: str
    key: str = "none"
    session: str = ""


async def _talk(http: aiohttp.ClientSession, door: Door, number: int, load: Load, seconds: Seconds) -> None:
    """One session from its first call to its last."""
    headers = {"Authorization": f"Bearer {door.key}", "Content-Type": "application/json"}
    messages = [{"role": "system", "content": "Mend it."}, _user(f"task {number // 8} " + "x" * load.context)]
    for turn in range(load.turns):
        await asyncio.sleep(load.work_s())
        body = json.dumps({"model": "m", "messages": messages, "stream": load.stream}).encode()
        began = time.perf_counter()
        async with http.post(f"{door.url}/v1/chat/completions", data=body, headers=headers) as answer:
            text = await answer.text()
            assert answer.status == 200 and REPLY.split()[0] in text, text
        (seconds.later if turn else seconds.first).append(time.perf_counter() - began)
        messages = [*messages, {"role": "assistant", "content": REPLY}, _user("y" * load.new)]


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


async def _load(pipe: Connection, proxy: Proxy, load: Load, keep: bool) -> None:
    """Sessions are opened before the calls and, but with `keep`, closed after them: neither is measured."""
    seconds = Seconds()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        control = GatewayControl(proxy.control_url, http)
        doors = [await _open(control, proxy, number) for number in range(load.sessions)]
        numbers = iter(range(load.sessions))

        async def agent() -> None:
            for number in numbers:
                await _talk(http, doors[number], number, load, seconds)

        await _next_word(pipe, None)
        await asyncio.gather(*(agent() for _ in range(load.at_once)))
        await _next_word(pipe, seconds)
        for door in doors:
            if door.session and not keep:
                await control.close(door.session)


async def _open(control: GatewayControl, proxy: Proxy, number: int) -> Door:
    if not proxy.control_url:
        return Door(proxy.url)
    handle = await control.open(run="b", group_id=f"g{number // 8}", rollout_id=f"r{number}", sampling=WIDE)
    return Door(proxy.url + handle.path, handle.key, handle.session_id)


async def _next_word(pipe: Connection, said: Seconds | None) -> None:
    """Say something, and go on when told to."""
    pipe.send(said)
    await asyncio.to_thread(pipe.recv)


def _agents(pipe: Connection) -> None:
    while (asked := pipe.recv()) is not None:
        asyncio.run(_load(pipe, *asked))
        pipe.send("done")


@dataclass(frozen=True)
class Ran:
    """What became of a load: seconds of calls, CPU seconds of the proxy, seconds in all."""

    seconds: Seconds
    cpu_s: float
    wall_s: float


class Agents:
    """All agents, in a process of their own."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def run(self, proxy: Proxy, load: Load, *, keep: bool = False) -> Ran:
        self._pipe.send((proxy, load, keep))
        self._pipe.recv()
        used, began = cpu_s(proxy.pid), time.perf_counter()
        self._pipe.send("go")
        seconds = self._pipe.recv()
        ran = Ran(seconds, cpu_s(proxy.pid) - used, time.perf_counter() - began)
        self._pipe.send("go")
        self._pipe.recv()
        return ran


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


def _measure(agents: Agents, proxy: Proxy, load: Load, direct: Seconds) -> dict[str, float]:
    agents.run(proxy, replace(load, at_once=4, sessions=4, rate=0))
    ran = agents.run(proxy, load)
    seconds, calls = ran.seconds, len(ran.seconds)
    return {
        "calls": calls,
        "cpu_ms_a_call": round(ran.cpu_s / calls * 1e3, 3),
        "calls_a_core_second": round(calls / ran.cpu_s, 1) if ran.cpu_s else 0.0,
        "calls_a_second": round(calls / ran.wall_s, 1),
        "p50_ms": _ms(seconds.later, 0.5),
        "p99_ms": _ms(seconds.later, 0.99),
        "added_p50_ms": round(_ms(seconds.later, 0.5) - _ms(direct.later, 0.5), 2),
        "added_p99_ms": round(_ms(seconds.later, 0.99) - _ms(direct.later, 0.99), 2),
        "added_first_p50_ms": round(_ms(seconds.first, 0.5) - _ms(direct.first, 0.5), 2),
        "load_average": round(os.getloadavg()[0], 1),
    }


def _ms(seconds: list[float], share: float) -> float:
    return round(sorted(seconds)[int(len(seconds) * share)] * 1e3, 2)


def _memory(agents: Agents, engine_url: str, contexts: list[int], sessions: int) -> None:
    """Resident memory that a live session of the gateway adds, after some turns."""
    for context in contexts:
        with running("kat-stream", engine_url, ENVS) as proxy:
            load = Load(4, 4, 5, context, NEW, False, 0)
            agents.run(proxy, load, keep=True)
            before = resident_bytes(proxy.pid)
            agents.run(proxy, replace(load, sessions=sessions), keep=True)
            kilobytes = (resident_bytes(proxy.pid) - before) / sessions / 1e3
        print(json.dumps({"context": context, "sessions": sessions, "kB_a_session": round(kilobytes, 1)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=400, help="of each case, or more")
    parser.add_argument("--turns", type=int, default=10, help="of each session")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 32, 256], help="sessions")
    parser.add_argument("--contexts", type=int, nargs="+", default=[2_000, 20_000, 100_000], help="tokens at the start")
    parser.add_argument("--rate", type=float, default=0, help="calls a second, by agents that work in between")
    parser.add_argument("--streams", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--proxies", nargs="+", default=["kat-stream"], choices=["kat-stream", "bare", *PACKAGES])
    parser.add_argument("--envs", type=Path, default=ENVS, help="where the rivals are installed")
    parser.add_argument("--memory", type=int, metavar="SESSIONS", help="measure the memory of so many instead")
    args = parser.parse_args()
    print(json.dumps({"machine": platform.machine(), "python": platform.python_version()}))
    with _process(_engine) as engine, _process(_agents) as pipe:
        agents, (url, chat_url) = Agents(pipe), engine.recv()
        if args.memory:
            _memory(agents, url, args.contexts, args.memory)
            return
        direct: dict[Load, Seconds] = {}
        for name in ("direct", *args.proxies):
            with running(name, url if name == "kat-stream" else chat_url, args.envs) as proxy:
                for at_once, tokens, stream in product(args.at_once, args.contexts, args.streams):
                    sessions = max(at_once, args.calls // args.turns)
                    load = Load(at_once, sessions, args.turns, tokens, NEW, bool(stream), args.rate)
                    if name == "direct":
                        direct[load] = agents.run(proxy, load).seconds
                        found = {"p50_ms": _ms(direct[load].later, 0.5), "p99_ms": _ms(direct[load].later, 0.99)}
                    else:
                        found = _measure(agents, proxy, load, direct[load])
                    print(json.dumps({"proxy": name, **asdict(load), **found}), flush=True)


if __name__ == "__main__":
    main()
