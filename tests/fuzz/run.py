"""Malformed records through the real stages on the in-memory log, with good groups in between.

Every message must end as a handled record, a dead letter or a counted filter, no stage may break, and every good group
must come out packed, archived and readable.
"""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import anyio

from consumers.packer import PackerHandler
from consumers.trainer import Trainer
from kat_stream.archive import ArchiveWriter, read_archive
from kat_stream.config import load
from kat_stream.errors import DecodeError
from kat_stream.log import Delivered, MemoryLog, Outcome, run_transform
from kat_stream.log.dead_letter_cap import DeadLetterLimit
from kat_stream.observe.ledger import Ledger
from kat_stream.observe.state import RunState
from kat_stream.observe.tail import json_line, line
from kat_stream.policy import model_dir
from kat_stream.rl.group import GroupRules
from kat_stream.rl.step import assemble
from kat_stream.service import Context
from kat_stream.training.learner import LearnerConfig, TorchLearner
from kat_stream.versions import Versions
from tests import observe_kit as kit
from tests.fuzz.records import good, malformed
from tests.waiting import until
from topics import CATALOGUE, PackedBatch

EVERY = 25
"""Malformed records between two good groups."""
NO_CAP = DeadLetterLimit(most=1 << 30, share=1.0)
WAIT_S = 300.0


@dataclass(frozen=True, slots=True)
class Result:
    sent: int
    unreadable: int
    dead_letters: int
    good_groups: int
    packed_groups: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems and self.packed_groups == self.good_groups


async def fuzz(count: int, seed: int, directory: Path) -> Result:
    """`count` malformed records; raises what a stage raised, which is a crash."""
    log = MemoryLog(retain_bytes=1 << 33)
    await log.apply_topics(CATALOGUE)
    groups = await _publish(log, count, random.Random(seed))
    handled = await _pack(log)
    arrived = await _train(log, directory)
    everything = await _everything(log)
    problems = [*_archived(everything, directory), *_shown(everything), *handled]
    unreadable = sum(not _readable(delivered) for delivered in everything)
    wanted = {f"{kit.RUN}-t{number:06d}" for number in range(groups)}
    letters = (await log.end_offsets("dead.letters"))[0]
    return Result(count, unreadable, letters, groups, len(wanted & arrived), tuple(problems))


async def _publish(log: MemoryLog, count: int, chance: random.Random) -> int:
    await log.publish(kit.version(0))
    groups = 0
    for at, message in enumerate(islice(malformed(chance), count)):
        if at % EVERY == 0:
            await log.publish(*good(groups))
            groups += 1
        await log.append(message)
    return groups


class Watched(PackerHandler):
    """The packer's own handler, counting what it was given."""

    def __init__(self, run: str, versions: Versions, rules: GroupRules) -> None:
        super().__init__(run, versions, rules)
        self.seen = 0

    async def handle(self, delivered: Delivered) -> Outcome:
        self.seen += 1
        return await super().handle(delivered)


async def _pack(log: MemoryLog) -> list[str]:
    """The packer over all that is there; what it did not take is a problem."""
    versions, stopping = Versions(kit.RUN), anyio.Event()
    await versions.load(log)
    handler = Watched(kit.RUN, versions, GroupRules(staleness=10**6, budget_tokens=4096, max_positions=1024))
    topics = ("trajectories", "rewards")
    ends = [sum((await log.end_offsets(topic)).values()) for topic in topics]

    async def stage() -> None:
        await run_transform(
            log,
            topics,
            group="packer",
            member="m",
            handler=handler,
            stopping=stopping,
            remember="groups.closed",
            dead_letters=NO_CAP,
        )

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stage)
        await until(lambda: handler.seen >= sum(ends), "all messages given to the packer", WAIT_S)
        stopping.set()
    return [] if handler.seen == sum(ends) else [f"the packer was given {handler.seen} of {sum(ends)} messages"]


async def _train(log: MemoryLog, directory: Path) -> set[str]:
    """The trainer takes in every batch; the groups that it would make steps of."""
    ctx = Context(load(None), kit.RUN, directory, log, "trainer")
    trainer = Trainer()
    trainer.learner = TorchLearner(model_dir("demo"), LearnerConfig())
    trainer.versions = Versions(kit.RUN)
    await trainer.versions.load(log)
    found: list[PackedBatch] = []
    async with log.follow(("batches",), poll_s=0.01) as follower:
        with anyio.fail_after(WAIT_S):
            while trainer.arrived or not await follower.caught_up():
                arrival = await trainer._next(ctx, follower)
                found += [arrival[1]] if arrival else []
    for group in found:
        assemble([group], trainer.versions.head, trainer.versions.forks, 2)
    return {group.group_id for group in found}


async def _everything(log: MemoryLog) -> list[Delivered]:
    async with log.follow([topic.name for topic in CATALOGUE]) as follower:
        return [delivered async for delivered in follower.catch_up(WAIT_S)]


def _archived(everything: Sequence[Delivered], directory: Path) -> list[str]:
    """Every message that is ours or nobody's comes back from the archive byte for byte."""
    writer = ArchiveWriter(directory / "archive", log_id="fuzz")
    for delivered in everything:
        writer.add(delivered)
    writer.flush()
    back = Counter((delivered.position, delivered.value) for delivered in read_archive(directory / "archive"))
    lost = Counter((delivered.position, delivered.value) for delivered in everything) - back
    return [f"not in the archive: {position}" for position, _ in lost]


def _shown(everything: Sequence[Delivered]) -> list[str]:
    """Ledger, state and tail take whatever comes; each message is one line."""
    ledger, state = Ledger(), RunState(run=kit.RUN)
    problems = []
    for delivered in everything:
        shown = [len(text.split("\n")) for text in (line(delivered), json_line(delivered))]
        if shown != [1, 1]:
            problems.append(f"{delivered.position}: shown as {shown} lines")
        if _readable(delivered):
            ledger.apply(delivered.record())
            state.apply(delivered.record(), delivered.timestamp_ms)
    summary = ledger.summary()
    if summary.requested != summary.accounted:
        problems.append(f"{summary.requested} requested, {summary.accounted} accounted for")
    ledger.check()
    return problems


def _readable(delivered: Delivered) -> bool:
    try:
        delivered.record()
    except DecodeError:
        return False
    return True


def run(count: int, seed: int) -> Result:
    with tempfile.TemporaryDirectory() as directory:
        return anyio.run(fuzz, count, seed, Path(directory))
