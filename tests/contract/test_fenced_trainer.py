"""A trainer that stood still while another one took over can neither publish nor save, and says why it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from kat_stream.config import load
from kat_stream.log import Log, open_log
from kat_stream.rl.group import GroupRules, pack_group
from kat_stream.runs import create_run
from tests.contract.kafka_kit import own_broker
from tests.unit.records import request, reward, trajectory, turn
from tests.waiting import until
from topics import CATALOGUE, LedgerEntry, PackedBatch, PolicyVersion, Record, TrainStep, encode

pytestmark = [pytest.mark.kafka, pytest.mark.anyio, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
WAIT_S = 250.0
PUBLISHED = ("policy.versions", "train.steps", "ledger")


@pytest.fixture
def bootstrap(kafka_bootstrap: str, tmp_path: Path) -> Iterator[str]:
    """A broker of its own: a service knows no other prefix than the default one, which other tests use too."""
    with own_broker(tmp_path / "broker") as own:
        assert own != kafka_bootstrap
        yield own


@pytest.fixture
async def log(bootstrap: str) -> AsyncIterator[Log]:
    opened = open_log(f"kafka:{bootstrap}")
    await opened.start()
    await opened.apply_topics(CATALOGUE)
    yield opened
    await opened.close()


@pytest.fixture
def run_dir(bootstrap: str, tmp_path: Path) -> Path:
    changes = [f"log.url='kafka:{bootstrap}'", f"run.directory='{tmp_path}'", "run.name=r", "run.steps=9"]
    changes += ["sampler.groups_per_step=1", "trainer.checkpoint_every=1"]
    return create_run(load(None, changes))[1]


def trainer(run_dir: Path, member: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "kat_stream.cli", "serve", "trainer", "--run", str(run_dir), "--member", member]
    out = (run_dir / f"{member}.txt").open("wb")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)


def group(number: int, version: str) -> PackedBatch:
    """Two rollouts that `version` sampled, one right and one wrong."""
    name = f"r-t{number:06d}"
    members = []
    for sample in range(2):
        asked = request(name, sample, 2)
        said = turn(asked, [1, 2, 3], [4 + sample, 6], version=version)
        members.append((trajectory(asked, said), reward(asked, float(sample))))
    return pack_group(members, version, {}, GroupRules(staleness=9, budget_tokens=256))


async def published(log: Log, topics: tuple[str, ...] = PUBLISHED) -> list[Record]:
    async with log.follow(topics) as follower:
        return [delivered.record() async for delivered in follower.catch_up()]


def lineage_of(record: Record) -> str:
    assert isinstance(record, PolicyVersion | TrainStep | LedgerEntry)
    return record.lineage


def of(lineage: str, records: list[Record]) -> list[bytes]:
    """What a lineage wrote, in an order that does not depend on the reader."""
    return sorted(encode(record) for record in records if lineage_of(record) == lineage)


async def test_a_zombie_trainer_is_fenced(log: Log, run_dir: Path) -> None:
    async def step(number: int, lineage: str = "") -> bool:
        steps = [record for record in await published(log, ("train.steps",)) if isinstance(record, TrainStep)]
        return any(step.step == number and lineage in ("", step.lineage) for step in steps)

    async def two_lineages() -> bool:
        return len({lineage_of(record) for record in await published(log, ("policy.versions",))}) == 2

    def saved(name: str) -> bool:
        return (run_dir / "checkpoints" / name).exists()

    zombie = trainer(run_dir, "trainer-a")
    living: subprocess.Popen[bytes] | None = None
    try:
        (first,) = await until(lambda: published(log, ("policy.versions",)), "the first version", WAIT_S)
        old = lineage_of(first)
        await log.publish(group(0, f"{old}.0"))
        await until(lambda: step(1), "step 1", WAIT_S)
        await until(lambda: saved(f"step-000001.{old}"), "its checkpoint", WAIT_S)
        zombie.send_signal(signal.SIGSTOP)
        living = trainer(run_dir, "trainer-b")
        await until(two_lineages, "the second trainer", WAIT_S)
        before = of(old, await published(log))
        zombie.send_signal(signal.SIGCONT)
        await log.publish(group(1, f"{old}.1"))
        await until(lambda: zombie.poll() is not None, "the end of the zombie", WAIT_S)
        (new,) = {lineage_of(record) for record in await published(log)} - {old}
        await log.publish(group(2, f"{new}.1"))
        await until(lambda: step(3, new), "step 3 of the living", WAIT_S)
        await until(lambda: saved(f"step-000003.{new}"), "its checkpoint", WAIT_S)
        await until(lambda: not saved(f"step-000001.{old}"), "the removal of the oldest", WAIT_S)
    finally:
        for process in (zombie, living):
            if process is not None:
                process.kill()
                process.wait(10)
    assert zombie.returncode == 1
    assert "transaction of r.trainer: ProducerFenced" in (run_dir / "trainer-a.txt").read_text()
    records = await published(log)
    assert of(old, records) == before
    steps = [record for record in records if isinstance(record, TrainStep)]
    assert [(s.lineage, s.step, s.groups) for s in steps] == [
        (old, 1, ("r-t000000",)),
        (new, 2, ("r-t000001",)),
        (new, 3, ("r-t000002",)),
    ]
    assert [entry.state for entry in records if isinstance(entry, LedgerEntry)] == ["trained"] * 6
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert names == ["OWNER", f"step-000002.{new}", f"step-000003.{new}"]
    assert (run_dir / "checkpoints" / "OWNER").read_text() == new
