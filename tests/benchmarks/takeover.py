"""How long a gateway takes to rebuild a session from `turns`: at 20k and 100k tokens, and 32 sessions at once.

    python -m tests.benchmarks.takeover [--kafka HOST:PORT]

Times are those of an agent's first request at the new gateway, apart from the call itself: the claim on the log, the
read from the session's start, the tree. Without --kafka the log is in memory, so that only our own work is timed.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import statistics
import time
import uuid

from kat_stream.gateway.calls import CallService
from kat_stream.gateway.limits import Limits
from kat_stream.gateway.peers import Peers
from kat_stream.gateway.recording import record
from kat_stream.gateway.render import Renderer
from kat_stream.gateway.sessions import SessionRequest, Sessions
from kat_stream.gateway.takeover import Takeover
from kat_stream.gateway.tickets import Mint
from kat_stream.log import Log, open_log
from kat_stream.routing import Router
from tests.contract.gateway_kit import by_bytes, tokenizer
from topics import Turn, VersionSpan, topic_named
from topics.record import pack_floats, pack_ints

TURNS, REPLY, REPEATS = 40, 100, 5
SIZES = (2_000, 20_000, 100_000)


def gateway(log: Log, secret: bytes) -> Takeover:
    """A gateway's sessions, without its listeners."""
    limits = Limits()
    calls = CallService(Renderer(tokenizer()), log, Router([]), "none", limits)
    return Takeover(log, Sessions(limits), calls, Mint(secret), Peers())


async def talk(log: Log, about: SessionRequest, session_id: str, tokens: int) -> None:
    """Publish TURNS turns of one line that ends at `tokens` tokens."""
    sampled = by_bytes("x" * (REPLY - 1))
    fresh, parent, length = tokens // TURNS - REPLY, "", 0
    for index in range(TURNS):
        name = uuid.uuid4().hex
        turn = Turn(
            run=about.run,
            group_id=about.group_id,
            rollout_id=about.rollout_id,
            session_id=session_id,
            turn_id=name,
            index=index,
            parent=parent,
            prefix_len=length,
            prompt_ids=pack_ints([index % 256] * max(fresh, 1)),
            sampled_ids=pack_ints(sampled),
            logprobs=pack_floats([-0.5] * len(sampled)),
            spans=(VersionSpan("a.1", 0, len(sampled)),),
            finish_reason="stop",
            content="x" * (REPLY - 1),
            after=parent,
            request=secrets.token_bytes(16),
            conversation=secrets.token_bytes(16),
            messages=2 * index + 1,
        )
        await record(log, turn, 30.0)
        parent, length = name, length + max(fresh, 1) + len(sampled)


async def measure(log: Log, tokens: int, sessions: int) -> tuple[float, float]:
    """Seconds until the slowest of them is there, and the median of one; all were opened by a gateway that is gone."""
    secret = secrets.token_bytes(32)
    old, new = gateway(log, secret), gateway(log, secret)
    opened = []
    for number in range(sessions):
        about = SessionRequest(run="bench", group_id=f"g{number // 8}", rollout_id=f"g{number // 8}s{number % 8}")
        session = await old.open(about)
        await talk(log, about, session.session_id, tokens)
        opened.append(session)
    times: list[float] = []

    async def take(session_id: str, key: str) -> None:
        began = time.perf_counter()
        taken = await new.admit(session_id, key)
        times.append(time.perf_counter() - began)
        assert taken is not None and len(taken.turns) == TURNS

    async with asyncio.TaskGroup() as group:
        for session in opened:
            group.create_task(take(session.session_id, session.key))
    return max(times), statistics.median(times)


async def main(bootstrap: str) -> None:
    log = open_log(f"kafka:{bootstrap}", prefix=f"b{uuid.uuid4().hex[:8]}.") if bootstrap else open_log("memory:")
    await log.start()
    try:
        await log.apply_topics([topic_named("turns")])
        print(f"log: {'Kafka' if bootstrap else 'memory'}, {TURNS} turns a session; best, median of {REPEATS} runs")
        for tokens in SIZES:
            for sessions in (1, 32):
                found = [await measure(log, tokens, sessions) for _ in range(REPEATS)]
                slowest = [whole for whole, _ in found]
                print(
                    f"{tokens:>7} tokens x {sessions:>2}: all after {min(slowest) * 1e3:7.1f} ms "
                    f"(median {statistics.median(slowest) * 1e3:7.1f}); one, median "
                    f"{statistics.median(one for _, one in found) * 1e3:7.1f} ms",
                    flush=True,
                )
    finally:
        await log.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kafka", default="", metavar="HOST:PORT", help="a broker; without it, the in-memory log")
    asyncio.run(main(parser.parse_args().kafka))
