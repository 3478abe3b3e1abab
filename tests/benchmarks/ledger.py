"""Ledger and replay of a large archived run: `python -m tests.benchmarks.ledger [--rollouts 100000] [--keep DIR]`.

A synthetic run goes straight into an archive through the archiver's own writer: groups of 8 rollouts of 3 turns, each
turn 300 new prompt tokens and 150 sampled ones with log-probs and 600 characters of text, so that a trajectory has
about 9 KB; a packed group has 4,800 tree tokens, about 100 KB; ledger words of packer and trainer; a step every 8
groups. Token ids are drawn from a pool that is wider than the compressor's window. Every phase is a process of its own,
whose highest resident memory counts. `--live` puts the same run on one real broker instead (the topics that the account
reads) and takes the account from there, as `kat-stream ledger` does of a run that has no archive yet.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import platform
import random
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import batched, count
from pathlib import Path

import msgspec
import numpy as np

from kat_stream.archive import ArchiveWriter, read_archive
from kat_stream.log import Log, open_log
from kat_stream.log.base import Delivered, Message, Position
from kat_stream.log.message import seal
from kat_stream.observe.heads import HEADS
from kat_stream.observe.ledger import Ledger
from kat_stream.observe.sources import LogSource, archived_heads, read_ledger
from tests import observe_kit as fab
from tests.benchmarks.log import a_broker
from topics import CATALOGUE, GroupMember, PackedBatch, PackedRow, Record, RolloutRequest, Turn, partition_of

GROUP, TURNS, PROMPT, SAMPLED, TREE, GROUPS_A_STEP = 8, 3, 300, 150, 4800, 8
FULL_BYTES = 64 << 20
AT_ONCE = 200
"""Messages of one publishing call."""
NEVER_S = 600.0
MIB = 1 << 20
POOL = (np.random.default_rng(0).zipf(1.2, 8 << 20) % 150_000).astype("<i4").tobytes()
NOISE = np.random.default_rng(1).normal(-1, 1, 1 << 20).astype("<f4").tobytes()


def _some(rng: random.Random, pool: bytes, numbers: int) -> bytes:
    first = 4 * rng.randrange(len(pool) // 4 - numbers)
    return pool[first : first + 4 * numbers]


def _turns(rng: random.Random, asked: RolloutRequest) -> tuple[Turn, ...]:
    first = fab.turns(asked)[0]
    return tuple(
        msgspec.structs.replace(
            first,
            turn_id=f"{asked.rollout_id}-{index}",
            index=index,
            prompt_ids=_some(rng, POOL, PROMPT),
            sampled_ids=_some(rng, POOL, SAMPLED),
            logprobs=_some(rng, NOISE, SAMPLED),
            content=_some(rng, POOL, 75).hex(),
        )
        for index in range(TURNS)
    )


def _batch(rng: random.Random, group_id: str, asked: list[RolloutRequest]) -> PackedBatch:
    members = [
        GroupMember(rollout_id=one.rollout_id, fate="packed", reward=one.sample % 2, turns=TURNS, tokens=SAMPLED)
        for one in asked
    ]
    arrays = {name: _some(rng, POOL, TREE) for name in ("ids", "pos", "parent", "end")}
    small = {name: _some(rng, POOL, TURNS * GROUP) for name in ("turn_len", "member", "advantage", "weight")}
    sampled = {
        "index": _some(rng, POOL, GROUP * TURNS * SAMPLED),
        "logprobs": _some(rng, NOISE, GROUP * TURNS * SAMPLED),
    }
    row = PackedRow(**arrays, **small, **sampled)
    return PackedBatch(run=fab.RUN, group_id=group_id, task_id="t", members=tuple(members), rows=(row,))


def _group(rng: random.Random, number: int) -> Iterator[Record]:
    group_id = f"{fab.RUN}-t{number:06d}"
    asked = [fab.request(group_id, sample, GROUP) for sample in range(GROUP)]
    yield from asked
    for one in asked:
        turns = _turns(rng, one)
        yield from turns
        yield msgspec.structs.replace(fab.trajectory(one), turns=turns)
        yield fab.reward(one, float(one.sample % 2))
    yield _batch(rng, group_id, asked)
    yield from (fab.entry(one, "packed", stage="packer") for one in asked)


def synthetic(rollouts: int) -> Iterator[Delivered]:
    """The messages of a run, as a log would deliver them, a millisecond apart."""
    rng, clock = random.Random(0), count(fab.START_MS)
    ends: dict[tuple[str, int], int] = {}
    for step in range(1, rollouts // (GROUP * GROUPS_A_STEP) + 1):
        numbers = range((step - 1) * GROUPS_A_STEP, step * GROUPS_A_STEP)
        asked = [fab.request(f"{fab.RUN}-t{n:06d}", sample, GROUP) for n in numbers for sample in range(GROUP)]
        trained = [one.rollout_id for one in asked]
        end = [fab.step(step, [f"{fab.RUN}-t{n:06d}" for n in numbers], trained), *fab.said(step, asked, trained, [])]
        for record in (*(record for number in numbers for record in _group(rng, number)), *end):
            message = seal(record)
            place = (message.topic, partition_of(record))
            ends[place] = ends.get(place, -1) + 1
            yield Delivered(Position(*place, ends[place]), message.key, message.value, message.headers, next(clock))


def _generate(directory: Path, rollouts: int) -> str:
    writer, raw, messages = ArchiveWriter(directory, run=fab.RUN), 0, 0
    for delivered in synthetic(rollouts):
        writer.add(delivered)
        raw, messages = raw + len(delivered.value), messages + 1
        if writer.waiting_bytes > FULL_BYTES:
            writer.flush()
            writer.merge()
    writer.flush()
    writer.merge(all_small=True)
    files = list(directory.rglob("*.parquet"))
    size = sum(path.stat().st_size for path in files)
    return f"{messages} messages, {raw / MIB:.0f} MiB of values -> {size / MIB:.0f} MiB in {len(files)} files"


def _ledger(directory: Path, rollouts: int) -> str:
    ledger = Ledger()
    for head in archived_heads(directory, fab.RUN):
        ledger.apply(head)
    return _checked(ledger)


def _checked(ledger: Ledger) -> str:
    summary, problems = ledger.summary(), ledger.check()
    assert not problems and summary.trained == summary.requested, problems[:3]
    return f"{summary.requested} = {summary.trained} trained"


def _publish(url: str, rollouts: int) -> str:
    return asyncio.run(_published(url, rollouts))


async def _published(url: str, rollouts: int) -> str:
    log = await _started(url)
    await log.apply_topics(CATALOGUE)
    messages = size = 0
    for some in batched((one for one in synthetic(rollouts) if one.position.topic in HEADS), AT_ONCE):
        ready = [Message(d.position.topic, d.position.partition, d.key, d.value, d.headers) for d in some]
        await log.append(*ready, deadline_s=NEVER_S)
        messages, size = messages + len(some), size + sum(len(d.value) for d in some)
    await log.close()
    return f"{messages} messages, {size / MIB:.0f} MiB of values"


def _live(url: str, rollouts: int) -> str:
    """What `kat-stream ledger` does of a live run."""

    async def read() -> Ledger:
        log = await _started(url)
        try:
            return await read_ledger(LogSource(log, url, fab.RUN))
        finally:
            await log.close()

    return _checked(asyncio.run(read()))


async def _started(url: str) -> Log:
    log = open_log(url)
    await log.start()
    return log


def _replay(directory: Path, rollouts: int) -> str:
    """What a trainer that repeats the run reads: every batch, decoded, and every step."""
    batches = steps = 0
    for delivered in read_archive(directory, ["batches", "train.steps"]):
        if isinstance(delivered.record(), PackedBatch):
            batches += 1
        else:
            steps += 1
    return f"{batches} batches, {steps} steps"


def _stream(directory: Path, rollouts: int) -> str:
    """Every message of every topic, not decoded."""
    size = sum(len(delivered.value) for delivered in read_archive(directory))
    return f"{size / MIB:.0f} MiB"


def _phase[Where: (Path, str)](work: Callable[[Where, int], str], where: Where, rollouts: int) -> None:
    began, cpu = time.perf_counter(), time.process_time()
    said = work(where, rollouts)
    seconds, busy = time.perf_counter() - began, time.process_time() - cpu
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{work.__name__[1:]:<9} {seconds:7.1f} s ({busy:.1f} s CPU), {rss:5.0f} MiB RSS: {said}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rollouts", type=int, default=100_000)
    parser.add_argument("--keep", type=Path, help="directory for the archive; it stays, and is used if it is there")
    parser.add_argument("--live", action="store_true", help="on a broker, not from an archive")
    args = parser.parse_args()
    print(f"{args.rollouts} rollouts; {platform.processor() or platform.machine()}, {os.cpu_count()} cores", flush=True)
    if args.live:
        with a_broker() as url:
            for work in (_publish, _live):
                _in_a_process(work, url, args.rollouts)
        return
    directory = args.keep or Path(tempfile.mkdtemp(prefix="kat-ledger-"))
    phases = [_ledger, _replay, _stream]
    if not (directory / "train.steps").exists():
        phases.insert(0, _generate)
    for phase in phases:
        _in_a_process(phase, directory, args.rollouts)
    if args.keep is None:
        shutil.rmtree(directory)


def _in_a_process[Where: (Path, str)](work: Callable[[Where, int], str], where: Where, rollouts: int) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_phase, args=(work, where, rollouts))
    process.start()
    process.join()
    assert process.exitcode == 0, work.__name__


if __name__ == "__main__":
    main()
