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


def _engine(pipe: Connection) -> None:
    async def serve() -> None:
        engine = await start_scripted_engine(saying(REPLY))
        pipe.send(engine.url)
        await asyncio.to_thread(pipe.recv)
        await engine.close()

    asyncio.run(serve())


def _agents(pipe: Connection, data_url: str, control_url: str, sessions: int, turns: int, chars: int) -> None:
    async def one(http: aiohttp.ClientSession, number: int, seconds: list[float]) -> None:
        control = GatewayControl(control_url, http)
        handle = await control.open(run="b", group_id=f"g{number // 8}", rollout_id=f"r{number}", sampling=WIDE)
        messages = [{"role": "system", "content": "Mend the repository."}, user(f"task {number // 8} " + "x" * chars)]
        for _ in range(turns):
            began = time.perf_counter()
            url, headers = f"{data_url}{handle.path}/v1/chat/completions", {"Authorization": f"Bearer {handle.key}"}
            async with http.post(url, json={"model": "m", "messages": messages}, headers=headers) as answer:
                reply = (await answer.json())["choices"][0]["message"]["content"]
            seconds.append(time.perf_counter() - began)
            messages = [*messages, {"role": "assistant", "content": reply}, user("y" * chars)]
        await control.close(handle.session_id)

    async def run() -> list[float]:
        seconds: list[float] = []
        async with aiohttp.ClientSession() as http:
            for start in range(0, sessions, 16):
                await asyncio.gather(*(one(http, n, seconds) for n in range(start, min(start + 16, sessions))))
        return seconds

    pipe.send(asyncio.run(run()))


async def _measure(engine_url: str, sessions: int, turns: int, chars: int) -> dict[str, float]:
    log = MemoryLog()
    await log.start()
    await log.apply_topics([topic_named("turns")])
    async with Router([engine_url]) as router:
        server = await start_gateway(
            tokenizer=tokenizer(), log=log, router=router, config=GatewaySection(), model_name="policy"
        )
        await asyncio.to_thread(_run_agents, server.data_url, server.control_url, 16, turns, chars)
        began, wall = time.process_time(), time.perf_counter()
        seconds = await asyncio.to_thread(_run_agents, server.data_url, server.control_url, sessions, turns, chars)
        used, wall = time.process_time() - began, time.perf_counter() - wall
        await server.close()
    await log.close()
    calls = sessions * turns
    seconds.sort()
    return {
        "calls": calls,
        "cpu_ms_a_call": round(used / calls * 1e3, 3),
        "calls_a_second": round(calls / wall, 1),
        "p50_ms": round(seconds[len(seconds) // 2] * 1e3, 2),
        "p99_ms": round(seconds[int(len(seconds) * 0.99)] * 1e3, 2),
    }


def _run_agents(data_url: str, control_url: str, sessions: int, turns: int, chars: int) -> list[float]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_agents, args=(theirs, data_url, control_url, sessions, turns, chars))
    process.start()
    seconds: list[float] = ours.recv()
    process.join()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=200)
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    engine = context.Process(target=_engine, args=(theirs,))
    engine.start()
    url = ours.recv()
    print(json.dumps({"machine": platform.machine(), "python": platform.python_version()}))
    for chars in (80, 2000, 20000):
        sessions = args.sessions if chars < 20000 else max(args.sessions // 8, 8)
        result = asyncio.run(_measure(url, sessions, args.turns, chars))
        print(json.dumps({"characters_a_message": chars, "turns": args.turns, **result}))
    ours.send("end")
    engine.join()


if __name__ == "__main__":
    main()
