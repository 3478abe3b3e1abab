"""An operator sets groups back to the beginning in mid-run: work is repeated, but nothing is packed twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest

from consumers.packer import CLOSED, PackerHandler
from kat_stream.log import Delivered, Emit, Log, Outcome, run_transform, run_work
from kat_stream.observe.sources import LogSource, read_ledger
from kat_stream.rl.group import GroupRules
from kat_stream.versions import Versions
from tests import observe_kit as kit
from tests.contract.conftest import BARE, Connect
from tests.contract.log_records import everything, until_committed, until_written
from tests.contract.stages_kit import reset
from topics import CATALOGUE, LedgerEntry, PackedBatch, Record, Reward, Trajectory

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("connect", BARE, indirect=True)]
SIZE, BEFORE, ALL = 2, 4, 6
"""Rollouts a group, groups before the reset, groups in all."""


def group(number: int) -> list[Record]:
    asked = [kit.request(f"{kit.RUN}-t{number:06d}", sample, SIZE) for sample in range(SIZE)]
    return [*asked, *map(kit.trajectory, asked)]


async def grade(delivered: Delivered) -> Outcome:
    """As the verifier does, without a sandbox."""
    record = delivered.record()
    assert isinstance(record, Trajectory)
    return Emit(kit.reward(record.request, float(record.request.sample)))


@asynccontextmanager
async def stages(log: Log) -> AsyncIterator[None]:
    """The life of a verifier and a packer."""
    versions, stopping = Versions(kit.RUN), anyio.Event()
    versions.take(kit.version(0))
    packer = PackerHandler(kit.RUN, versions, GroupRules(staleness=2, budget_tokens=256))

    async def verify() -> None:
        await run_work(log, ["trajectories"], group="demo.verifier", member="v", handler=grade, stopping=stopping)

    async def pack() -> None:
        topics = ("trajectories", "rewards")
        how = {"group": "demo.packer", "member": "p", "handler": packer, "stopping": stopping}
        await run_transform(log, topics, remember=CLOSED, mine=packer.mine, late=packer.late, **how)  # type: ignore[arg-type]

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(verify)
        tasks.start_soon(pack)
        yield
        stopping.set()


async def records(log: Log, topic: str) -> list[Record]:
    return [one.record() for one in await everything(log, topic)]


async def finished(log: Log, groups: int, rewards: int) -> None:
    """So many batches and rewards are there, and both groups have read everything."""
    await until_written(log, "batches", groups)
    await until_written(log, "rewards", rewards)
    await until_committed(log, "demo.verifier", "trajectories")
    await until_committed(log, "demo.packer", "trajectories", "rewards")


async def test_a_reset_of_verifier_and_packer_doubles_no_output(connect: Connect) -> None:
    log = await connect()
    await log.apply_topics(CATALOGUE)
    await log.publish(*[record for number in range(BEFORE) for record in group(number)])
    async with stages(await connect()):
        await finished(log, BEFORE, BEFORE * SIZE)
    await reset(log, "demo.verifier", "trajectories")
    await reset(log, "demo.packer", "trajectories", "rewards")
    await log.publish(*[record for number in range(BEFORE, ALL) for record in group(number)])
    async with stages(await connect()):
        await finished(log, ALL, (BEFORE + ALL) * SIZE)
    graded = Counter(record.rollout_id for record in await records(log, "rewards") if isinstance(record, Reward))
    assert Counter(graded.values()) == {2: BEFORE * SIZE, 1: (ALL - BEFORE) * SIZE}, "the work was repeated"
    batches = [record.group_id for record in await records(log, "batches") if isinstance(record, PackedBatch)]
    assert Counter(batches) == Counter(f"{kit.RUN}-t{number:06d}" for number in range(ALL))
    words = [record.rollout_id for record in await records(log, "ledger") if isinstance(record, LedgerEntry)]
    assert len(words) == len(set(words)) == ALL * SIZE
    account = await read_ledger(LogSource(log, "here", kit.RUN))
    assert account.check() == []
    assert account.summary().in_flight == {"packed": ALL * SIZE}
