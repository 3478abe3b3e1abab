"""What a reply costs the gateway by its length: `python -m tests.benchmarks.gateway_replies`.

CPU of a gateway's process for a whole call, median of --calls: whole replies, streamed ones as the gateway reads them
(`Limits.stream_tokens` between two pieces), and streamed ones with a piece for each token, which is what an engine
sends that is not told otherwise. The scripted engine, in a process of its own, takes 0.1 ms or more for a token; the
client is in the gateway's process, so its reading is in all figures, and so is what a gateway does anyway in that time.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection

import aiohttp

from kat_stream.config import GatewaySection
from kat_stream.engines.scripted import start_scripted_engine
from kat_stream.gateway.app import start_gateway
from kat_stream.gateway.client import GatewayControl
from kat_stream.gateway.limits import Limits
from kat_stream.log.memory import MemoryLog
from kat_stream.routing import Router
from tests.contract.gateway_kit import by_bytes, tokenizer
from topics import CATALOGUE, Sampling

WIDE = Sampling(max_context=1 << 20, max_turns=1 << 20, max_new_tokens=1 << 16)
WAYS = {"whole": (False, Limits()), "streamed": (True, Limits()), "a piece a token": (True, Limits(stream_tokens=1))}
TOKEN_S = 0.0001


def _engine(pipe: Connection, tokens: int) -> None:
    said = by_bytes("x" * (tokens - 1))

    async def serve() -> None:
        engine = await start_scripted_engine(lambda _prompt: said, token_s=TOKEN_S)
        pipe.send(engine.url)
        await asyncio.to_thread(pipe.recv)
        await engine.close()

    asyncio.run(serve())


@asynccontextmanager
async def _an_engine(tokens: int) -> AsyncIterator[str]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_engine, args=(theirs, tokens), daemon=True)
    process.start()
    try:
        yield await asyncio.to_thread(ours.recv)
    finally:
        ours.send("end")
        await asyncio.to_thread(process.join, 10)


async def _cpu_ms(url: str, way: str, calls: int) -> float:
    """Of one call."""
    stream, limits = WAYS[way]
    log = MemoryLog()
    await log.apply_topics(CATALOGUE)
    config = GatewaySection(port=0, control_port=0)
    async with Router([url]) as router, aiohttp.ClientSession() as http:
        gateway = await start_gateway(
            tokenizer=tokenizer(), log=log, router=router, config=config, model_name="m", limits=limits
        )
        control = GatewayControl(gateway.control_url, http)
        handle = await control.open(run="r", group_id="g", rollout_id="o", sampling=WIDE)
        used = []
        for number in range(calls + 1):
            body = {"model": "m", "messages": [{"role": "user", "content": f"go {number}"}], "stream": stream}
            began = time.process_time()
            key = {"Authorization": f"Bearer {handle.key}"}
            async with http.post(f"{gateway.data_url}{handle.path}/v1/chat/completions", json=body, headers=key) as got:
                assert got.status == 200 and await got.read()
            used.append((time.process_time() - began) * 1e3)
        await gateway.close()
    return statistics.median(used[1:])


async def _row(tokens: int, calls: int) -> str:
    async with _an_engine(tokens) as url:
        cells = {way: await _cpu_ms(url, way, calls) for way in WAYS}
    ratio = cells["a piece a token"] / cells["streamed"]
    return f"{tokens:>6} tokens  " + "  ".join(f"{way} {ms:8.1f} ms" for way, ms in cells.items()) + f"  ({ratio:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[20, 250, 1000, 4000], help="of a reply")
    parser.add_argument("--calls", type=int, default=7)
    args = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}", flush=True)
    for tokens in args.tokens:
        print(asyncio.run(_row(tokens, args.calls)), flush=True)


if __name__ == "__main__":
    main()
