"""What acknowledgement before the reply adds to a model call: `python -m tests.benchmarks.ack`.

The gateway runs in this process in front of a scripted engine that answers at once; agents and engine are processes of
their own. The same sessions run on the in-memory log and on one real broker (acks=all), in turn, `--repeats` times. The
wait for the log is timed around each `publish`, apart from how busy the machine is with the rest of the call; whole
calls are given beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import statistics
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

from kat_stream.config import GatewaySection
from kat_stream.gateway.app import start_gateway
from kat_stream.log import Log, open_log
from kat_stream.routing import Router
from tests.benchmarks.gateway import Load, _engine, _run_agents
from tests.benchmarks.log import a_broker
from tests.contract.gateway_kit import tokenizer
from topics import Record, topic_named

P50_MS, P99_MS = 3.0, 15.0
"""What the log may add."""


@dataclass
class Timed:
    """A log's `publish`, and how long each took."""

    log: Log
    seconds: list[float] = field(default_factory=list)

    async def publish(self, *records: Record, deadline_s: float = 30.0) -> None:
        began = time.perf_counter()
        await self.log.publish(*records, deadline_s=deadline_s)
        self.seconds.append(time.perf_counter() - began)


def quantiles_ms(seconds: list[float]) -> tuple[float, float]:
    """p50 and p99 in milliseconds."""
    ordered = sorted(seconds)
    return ordered[len(ordered) // 2] * 1e3, ordered[int(len(ordered) * 0.99)] * 1e3


async def measure(url: str, engine_url: str, load: Load) -> tuple[list[float], list[float]]:
    """Seconds of each wait for the log, and of each whole call as agents see it."""
    async with AsyncExitStack() as stack:
        log = open_log(url, prefix=f"ack{time.monotonic_ns()}.")
        await log.start()
        stack.push_async_callback(log.close)
        await log.apply_topics([topic_named("turns")])
        router = await stack.enter_async_context(Router([engine_url]))
        timed = Timed(log)
        server = await start_gateway(
            tokenizer=tokenizer(),
            log=timed,
            router=router,
            config=GatewaySection(tools="none"),
            model_name="policy",
        )
        stack.push_async_callback(server.close)
        warm = Load(load.at_once, min(load.at_once, 4), 2, load.context, load.new, load.stream)
        await asyncio.to_thread(_run_agents, server.data_url, server.control_url, warm)
        timed.seconds.clear()
        calls = await asyncio.to_thread(_run_agents, server.data_url, server.control_url, load)
        return timed.seconds, calls


def _rows(broker_url: str, engine_url: str, load: Load, repeats: int) -> list[dict[str, Any]]:
    found: dict[str, tuple[list[float], list[float]]] = {"memory": ([], []), "kafka": ([], [])}
    for _ in range(repeats):
        for name, url in (("memory", "memory:"), ("kafka", broker_url)):
            waits, calls = asyncio.run(measure(url, engine_url, load))
            found[name][0].extend(waits)
            found[name][1].extend(calls)
    rows = []
    for name, (waits, calls) in found.items():
        wait, call = quantiles_ms(waits), quantiles_ms(calls)
        rows.append({"log": name, "calls": len(calls), "wait": wait, "call": call, "mean_call": statistics.mean(calls)})
    return rows


def report(at_once: int, rows: list[dict[str, Any]]) -> str:
    """One line a log, and the verdict on what the broker adds over memory."""
    lines = [
        f"{at_once:>4} sessions  {row['log']:<6} wait for log p50 {row['wait'][0]:6.2f} p99 {row['wait'][1]:6.2f} ms"
        f"   whole call p50 {row['call'][0]:7.2f} p99 {row['call'][1]:7.2f} ms  ({row['calls']} calls)"
        for row in rows
    ]
    memory, kafka = rows
    p50, p99 = (kafka["wait"][i] - memory["wait"][i] for i in (0, 1))
    verdict = "within" if p50 <= P50_MS and p99 <= P99_MS else "OVER"
    return "\n".join([*lines, f"      adds p50 {p50:.2f} p99 {p99:.2f} ms: {verdict} {P50_MS:g} / {P99_MS:g} ms"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 64, 256], help="concurrent sessions")
    parser.add_argument("--calls", type=int, default=2000, help="of each case and repeat")
    parser.add_argument("--context", type=int, default=2000, help="characters at the start of a session")
    parser.add_argument("--turns", type=int, default=8, help="calls of a session")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    engine = context.Process(target=_engine, args=(theirs,))
    engine.start()
    engine_url = ours.recv()
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    print(json.dumps(machine), flush=True)
    with a_broker() as url:
        for at_once in args.at_once:
            sessions = max(at_once, args.calls // args.turns)
            load = Load(at_once, sessions, args.turns, args.context, 300, stream=False)
            print(report(at_once, _rows(url, engine_url, load, args.repeats)), flush=True)
    ours.send("end")
    engine.join(30)


if __name__ == "__main__":
    main()
