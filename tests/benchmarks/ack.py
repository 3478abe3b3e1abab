"""What acknowledgement before the reply adds to a model call: `python -m tests.benchmarks.ack`.

The gateway runs in this process in front of a scripted engine that answers at once; agents and engine are processes of
their own. The same sessions run on the in-memory log and on one real broker (acks=all), in turn, `--repeats` times. The
wait for the log is timed around each `publish`, apart from how busy the machine is with the rest of the call; whole
calls are given beside it.

Load: a session calls, gets its reply, and calls again after a pause drawn evenly from half to one and a half times
`--pause` (1.5 s: generation and the agent's tool; real ones take longer). One session alone calls without pause: its
next call waits for the last one anyway. The last rows are flat out, every session without pause: the gateway's process
is then saturated, and what the log adds is the queue in front of it.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import platform
import random
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import count
from multiprocessing.connection import Connection

import aiohttp

from kat_stream.config import GatewaySection
from kat_stream.engines.scripted import start_scripted_engine
from kat_stream.gateway.app import GatewayControl, start_gateway
from kat_stream.log import Log, Message, open_log
from kat_stream.routing import Router
from producers.gateway import settle
from tests.benchmarks.log import a_broker
from tests.contract.gateway_kit import saying, tokenizer, user
from topics import Sampling, topic_named

P50_MS, P99_MS = 3.0, 15.0
"""What the log may add to a call of paced sessions."""
REPLY = "cat src/config.py"
TURNS, CONTEXT, NEW = 8, 2000, 300
"""Calls of a session, characters of its task, characters of each tool result."""
WARM_S = 2.0
LATEST_S = 120.0
START = multiprocessing.get_context("fork")
"""Engine and agents are forked first of all, when there is no thread yet: importing all this takes seconds."""


@dataclass(frozen=True)
class Load:
    """So many sessions, with a pause of so many seconds in the mean between a reply and the next call."""

    sessions: int
    pause_s: float


@dataclass
class Waits:
    """A log's `append`, and how long each took; what began before `since` does not count."""

    log: Log
    seconds: list[float] = field(default_factory=list)
    since: float = 0.0

    async def append(self, *messages: Message, deadline_s: float = 30.0) -> None:
        began = time.monotonic()
        await self.log.append(*messages, deadline_s=deadline_s)
        if began > self.since:
            self.seconds.append(time.monotonic() - began)


@dataclass
class Found:
    """Seconds of each wait for the log, seconds of each whole call as agents see it, and the calls a second."""

    waits: list[float] = field(default_factory=list)
    calls: list[float] = field(default_factory=list)
    rate: float = 0.0


def _engine(pipe: Connection) -> None:
    async def serve() -> None:
        engine = await start_scripted_engine(saying(REPLY))
        pipe.send(engine.url)
        await asyncio.to_thread(pipe.recv)
        await engine.close()

    asyncio.run(serve())


def _agents(pipe: Connection) -> None:
    """Answer each (data URL, control URL, load, seconds) with the seconds of its calls, until None comes."""
    while (asked := pipe.recv()) is not None:
        pipe.send(asyncio.run(_call_for(*asked)))


async def _call_for(data_url: str, control_url: str, load: Load, seconds: float) -> list[float]:
    """Seconds of each call that began in the last `seconds` of the run."""
    found: list[float] = []
    numbers, chance = count(), random.Random(0)
    begin = time.monotonic() + WARM_S
    end = begin + seconds
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        control = GatewayControl(control_url, http)

        async def one_session(number: int) -> None:
            name = f"r{number}"
            handle = await control.open(
                run="b", group_id=f"g{number // 8}", rollout_id=name, sampling=Sampling(max_context=1 << 20)
            )
            url, headers = f"{data_url}{handle.path}/v1/chat/completions", {"Authorization": f"Bearer {handle.key}"}
            messages = [user(f"task {number // 8} " + "x" * CONTEXT)]
            for _ in range(TURNS):
                began = time.monotonic()
                if began > end:
                    break
                async with http.post(url, json={"model": "m", "messages": messages}, headers=headers) as answer:
                    text = await answer.text()
                    assert answer.status == 200 and REPLY.split()[0] in text, text
                if began > begin:
                    found.append(time.monotonic() - began)
                messages = [*messages, {"role": "assistant", "content": REPLY}, user("y" * NEW)]
                await asyncio.sleep(load.pause_s * chance.uniform(0.5, 1.5))
            await control.close(handle.session_id)

        async def lane() -> None:
            await asyncio.sleep(load.pause_s * chance.random())
            while time.monotonic() < end:
                await one_session(next(numbers))

        async with asyncio.timeout(LATEST_S):
            await asyncio.gather(*(lane() for _ in range(load.sessions)))
    return found


async def measure(
    url: str, engine_url: str, agents: Connection, load: Load, seconds: float
) -> tuple[list[float], list[float]]:
    """Seconds of each wait for the log, and of each whole call."""
    async with AsyncExitStack() as stack:
        log = open_log(url, prefix=f"ack{time.monotonic_ns()}.")
        await log.start()
        stack.push_async_callback(log.close)
        await log.apply_topics([topic_named("turns")])
        router = await stack.enter_async_context(Router([engine_url]))
        waits = Waits(log, since=float("inf"))
        server = await start_gateway(
            tokenizer=tokenizer(), log=waits, router=router, config=GatewaySection(tools="none"), model_name="policy"
        )
        stack.push_async_callback(server.close)
        settle()
        agents.send((server.data_url, server.control_url, load, seconds))
        waits.since = time.monotonic() + WARM_S
        calls: list[float] = await asyncio.to_thread(agents.recv)
        return waits.seconds, calls


def quantiles_ms(seconds: list[float]) -> tuple[float, float]:
    """p50 and p99 in milliseconds."""
    ordered = sorted(seconds)
    return ordered[len(ordered) // 2] * 1e3, ordered[int(len(ordered) * 0.99)] * 1e3


def compare(
    broker_url: str, engine_url: str, agents: Connection, load: Load, seconds: float, repeats: int
) -> dict[str, Found]:
    """Both logs in turn."""
    found = {"memory": Found(), "kafka": Found()}
    for _ in range(repeats):
        for name, url in (("memory", "memory:"), ("kafka", broker_url)):
            waits, calls = asyncio.run(measure(url, engine_url, agents, load, seconds))
            found[name].waits += waits
            found[name].calls += calls
    for one in found.values():
        one.rate = len(one.calls) / seconds / repeats
    return found


def report(load: Load, found: dict[str, Found]) -> str:
    """A row of the table, and what the broker adds over memory."""
    (memory50, memory99), (kafka50, kafka99) = (quantiles_ms(found[name].waits) for name in ("memory", "kafka"))
    (whole50, whole99), kafka = quantiles_ms(found["kafka"].calls), found["kafka"]
    p50, p99 = kafka50 - memory50, kafka99 - memory99
    paced = load.pause_s > 0 or load.sessions == 1
    verdict = ("within" if p50 <= P50_MS and p99 <= P99_MS else "OVER") if paced else ""
    return (
        f"{load.sessions:>8} {f'{load.pause_s:g} s' if load.pause_s else 'none':>6} {kafka.rate:>8.0f}"
        f" {memory50:>7.2f}/{memory99:<7.2f} {kafka50:>7.2f}/{kafka99:<7.2f} {p50:>7.2f}/{p99:<7.2f}"
        f" {whole50:>7.1f}/{whole99:<7.1f} {len(kafka.waits):>6} {verdict}"
    )


def _started(work: Callable[[Connection], None]) -> Connection:
    ours, theirs = START.Pipe()
    START.Process(target=work, args=(theirs,), daemon=True).start()
    theirs.close()  # of a process that died one then reads the end, not silence
    return ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 64, 256], help="at once")
    parser.add_argument("--pause", type=float, default=1.5, help="seconds between a reply and the next call, mean")
    parser.add_argument("--seconds", type=float, default=10, help="of each case, log and repeat")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--paced", action="store_true", help="without the rows that are flat out")
    args = parser.parse_args()
    many = [sessions for sessions in args.sessions if sessions > 1]
    loads = [Load(sessions, args.pause if sessions > 1 else 0.0) for sessions in args.sessions]
    loads += [] if args.paced else [Load(sessions, 0.0) for sessions in many]
    engine, agents = _started(_engine), _started(_agents)
    engine_url = engine.recv()
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; p50/p99 in ms;")
    print(f"the log may add {P50_MS:g}/{P99_MS:g} to a call of paced sessions")
    print(
        "sessions  pause  calls/s  wait in memory  wait on Kafka    Kafka adds      whole call      waits", flush=True
    )
    with a_broker() as url:
        for load in loads:
            print(report(load, compare(url, engine_url, agents, load, args.seconds, args.repeats)), flush=True)
    for pipe in (engine, agents):
        pipe.send(None)


if __name__ == "__main__":
    main()
