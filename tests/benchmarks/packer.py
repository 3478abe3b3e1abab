"""The packer's rate through transactions on one real broker: `python -m tests.benchmarks.packer`.

Trajectories and rewards of `--groups` groups of 8 are on the log before the clock starts; the packer's own handler then
runs in `run_transform` (join, tree packing, batch and ledger words and offsets in one transaction a partition), in this
process. Counted from the moment it joins until the committed places reach the ends of both topics, and checked: every
group has one batch, every rollout one ledger word, and nothing lies between.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import random
import time

import anyio
import msgspec

from consumers.packer import PackerHandler
from kat_stream.log import Log, open_log, run_transform
from kat_stream.rl.group import GroupRules
from kat_stream.versions import Versions
from tests import observe_kit as fab
from tests.benchmarks.log import a_broker, trajectory_of
from topics import CATALOGUE, LedgerEntry, PackedBatch, Record, Trajectory, Turn, VersionSpan

GROUP = 8
LATEST_S = 900.0
STAGE = "bench.packer"
RULES = GroupRules(staleness=2, budget_tokens=1 << 16)


def group_of(rng: random.Random, number: int, size: int) -> list[Record]:
    """Trajectories of one group, each with its reward; half of them passed."""
    members = [trajectory_of(rng, number * GROUP + sample, size) for sample in range(GROUP)]
    chained = [_chained(member) for member in members]
    return [*chained, *(fab.reward(member.request, float(member.request.sample % 2)) for member in chained)]


def _chained(member: Trajectory) -> Trajectory:
    """Each turn extends the one before it, as an agent's history does."""
    turns: list[Turn] = []
    length = 0
    for turn in member.turns:
        parent = turns[-1].turn_id if turns else ""
        turns.append(
            msgspec.structs.replace(turn, parent=parent, prefix_len=length, spans=_spans(len(turn.sampled_ids)))
        )
        length += (len(turn.prompt_ids) + len(turn.sampled_ids)) // 4
    return msgspec.structs.replace(member, turns=tuple(turns))


def _spans(sampled_bytes: int) -> tuple[VersionSpan, ...]:
    return (VersionSpan("a.0", 0, sampled_bytes // 4),)


async def fill(log: Log, groups: int, size: int) -> int:
    """Publish everything; how many messages."""
    rng, messages = random.Random(2), 0
    for number in range(groups):
        records = group_of(rng, number, size)
        await log.publish(*records)
        messages += len(records)
    return messages


async def pack(log: Log, batch: int) -> tuple[float, float]:
    """Wall and CPU seconds until the stage has committed all that is on its topics."""
    stopping, versions = anyio.Event(), Versions(fab.RUN)
    versions.take(fab.version(0))
    began, cpu = time.perf_counter(), time.process_time()
    async with anyio.create_task_group() as tasks:

        async def stage() -> None:
            await run_transform(
                log,
                ("trajectories", "rewards"),
                group=STAGE,
                member="bench",
                handler=PackerHandler(fab.RUN, versions, RULES),
                stopping=stopping,
                remember="groups.closed",
                batch=batch,
            )

        tasks.start_soon(stage)
        with anyio.fail_after(LATEST_S):
            while not await _done(log):
                await anyio.sleep(0.05)
        took = time.perf_counter() - began, time.process_time() - cpu
        stopping.set()
    return took


async def _done(log: Log) -> bool:
    places = await log.committed(STAGE)
    for topic in ("trajectories", "rewards"):
        for number, end in (await log.end_offsets(topic)).items():
            if end and places.get((topic, number), 0) < end:  # type: ignore[call-overload]
                return False
    return True


async def check(log: Log, groups: int) -> str:
    """What the stage wrote, exactly; in words."""
    batches: list[PackedBatch] = []
    words: list[LedgerEntry] = []
    async with log.follow(["batches", "ledger"]) as follower:
        async for delivered in follower.catch_up(LATEST_S):
            record = delivered.record()
            if isinstance(record, PackedBatch):
                batches.append(record)
            elif isinstance(record, LedgerEntry):
                words.append(record)
    assert len({batch.group_id for batch in batches}) == len(batches) == groups
    assert len({word.rollout_id for word in words}) == len(words) == groups * GROUP
    assert all(word.state == "packed" for word in words), words[0]
    tokens = sum(batch.tree_tokens for batch in batches)
    return f"{groups} batches with {tokens} tree tokens, {len(words)} ledger words"


async def measure(url: str, groups: int, size: int, batch: int) -> None:
    log = open_log(url, prefix=f"packer{time.monotonic_ns()}.")
    await log.start()
    await log.apply_topics(CATALOGUE)
    messages = await fill(log, groups, size)
    seconds, cpu = await pack(log, batch)
    said = await check(log, groups)
    await log.close()
    print(
        f"{size // 1000:>4} KB, up to {batch} messages a transaction: {groups / seconds:6.1f} groups/s,"
        f" {messages / seconds:7.0f} records/s in, {cpu / groups * 1e3:5.1f} ms CPU a group; {said}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, default=500)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 40_000], help="bytes of a trajectory")
    parser.add_argument("--batches", type=int, nargs="+", default=[100], help="messages a transaction, at most")
    args = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}", flush=True)
    with a_broker() as url:
        for size in args.sizes:
            for batch in args.batches:
                asyncio.run(measure(url, args.groups, size, batch))


if __name__ == "__main__":
    main()
