"""CPU of the gateway for one model call, in a process of its own: `python -m tests.benchmarks.gateway`.

A scripted engine and the agents are other processes, so that `process_time` here is the gateway's alone: HTTP server,
session, template, tokenizer, routing, HTTP client to the engine, record, in-memory log.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import platform
import time
from dataclasses import asdict, dataclass, replace
from itertools import product
from multiprocessing.connection import Connection

import aiohttp

from kat_stream.config import GatewaySection
from kat_stream.engines.scripted import start_scripted_engine
from kat_stream.gateway.app import GatewayControl, start_gateway
from kat_stream.log.memory import MemoryLog
from kat_stream.routing import Router
from tests.contract.gateway_kit import saying, tokenizer, user
from topics import Sampling, topic_named

REPLY = "cat src/config.py"
WIDE = Sampling(max_context=1 << 20)
NEW = 300
"""Tokens that each turn adds. The tokenizer of the tests writes a token a character."""


@dataclass(frozen=True)
class Load:
    """One case: `context` tokens at the start of each session, `new` more in each turn."""

    at_once: int
    sessions: int
    turns: int
    context: int
    new: int
    stream: bool


def _engine(pipe: Connection) -> None:
    async def serve() -> None:
        engine = await start_scripted_engine(saying(REPLY))
        pipe.send(engine.url)
        await asyncio.to_thread(pipe.recv)
        await engine.close()

    asyncio.run(serve())


def _agents(pipe: Connection, data_url: str, control_url: str, load: Load) -> None:
    async def one(http: aiohttp.ClientSession, number: int, seconds: list[float]) -> None:
        control = GatewayControl(control_url, http)
        handle = await control.open(run="b", group_id=f"g{number // 8}", rollout_id=f"r{number}", sampling=WIDE)
        url, headers = f"{data_url}{handle.path}/v1/chat/completions", {"Authorization": f"Bearer {handle.key}"}
        first = user(f"task {number // 8} " + "x" * load.context)
        messages = [{"role": "system", "content": "Mend the repository."}, first]
        for _ in range(load.turns):
            began = time.perf_counter()
            body = {"model": "m", "messages": messages, "stream": load.stream}
            async with http.post(url, json=body, headers=headers) as answer:
                text = await answer.text()
                assert answer.status == 200 and REPLY.split()[0] in text, text
            seconds.append(time.perf_counter() - began)
            messages = [*messages, {"role": "assistant", "content": REPLY}, user("y" * load.new)]
        await control.close(handle.session_id)

    async def run() -> list[float]:
        seconds: list[float] = []
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
            for start in range(0, load.sessions, load.at_once):
                ours = range(start, min(start + load.at_once, load.sessions))
                await asyncio.gather(*(one(http, n, seconds) for n in ours))
        return seconds

    pipe.send(asyncio.run(run()))


async def _measure(engine_url: str, load: Load) -> dict[str, float]:
    log = MemoryLog()
    await log.start()
    await log.apply_topics([topic_named("turns")])
    async with Router([engine_url]) as router:
        server = await start_gateway(
            tokenizer=tokenizer(), log=log, router=router, config=GatewaySection(tools="none"), model_name="policy"
        )
        warm = replace(load, sessions=min(load.at_once, 4))
        await asyncio.to_thread(_run_agents, server.data_url, server.control_url, warm)
        began, wall = time.process_time(), time.perf_counter()
        seconds = await asyncio.to_thread(_run_agents, server.data_url, server.control_url, load)
        used, wall = time.process_time() - began, time.perf_counter() - wall
        await server.close()
    await log.close()
    calls = load.sessions * load.turns
    seconds.sort()
    return {
        "calls": calls,
        "cpu_ms_a_call": round(used / calls * 1e3, 3),
        "calls_a_second": round(calls / wall, 1),
        "p50_ms": round(seconds[len(seconds) // 2] * 1e3, 2),
        "p99_ms": round(seconds[int(len(seconds) * 0.99)] * 1e3, 2),
    }


def _run_agents(data_url: str, control_url: str, load: Load) -> list[float]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_agents, args=(theirs, data_url, control_url, load))
    process.start()
    seconds: list[float] = ours.recv()
    process.join()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=800, help="of each case (fewer with long contexts)")
    parser.add_argument("--turns", type=int, default=10, help="of each session")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 32, 256], help="sessions")
    parser.add_argument("--contexts", type=int, nargs="+", default=[2_000, 20_000, 100_000], help="tokens at the start")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    engine = context.Process(target=_engine, args=(theirs,))
    engine.start()
    url = ours.recv()
    print(json.dumps({"machine": platform.machine(), "python": platform.python_version()}))
    for at_once, tokens, stream in product(args.at_once, args.contexts, (False, True)):
        calls = max(args.calls * 2_000 // tokens, args.turns * 2)
        sessions = max(min(at_once, calls // args.turns), calls // args.turns)
        load = Load(at_once, sessions, args.turns, tokens, NEW, stream)
        print(json.dumps({**asdict(load), **asyncio.run(_measure(url, load))}), flush=True)
    ours.send("end")
    engine.join()


if __name__ == "__main__":
    main()
