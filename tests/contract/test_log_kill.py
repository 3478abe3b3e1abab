"""kill -9 of a process on a real broker: nothing is lost, what was finished is not repeated, no group comes twice."""

from __future__ import annotations

import random
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path

import anyio
import pytest

from kat_stream.errors import LogUnavailable
from kat_stream.log import Delivered, Emit, Log, Outcome, broker, open_log, run_transform, run_work
from kat_stream.log.tracker import Tracker
from tests.contract.conftest import TOPICS
from tests.contract.kafka_kit import kill_broker, own_broker
from tests.contract.log_records import SIZE, GroupJoin, everything, forgive_cut_off_commits, reward
from tests.waiting import until
from topics import LedgerEntry, Reward

pytestmark = [pytest.mark.anyio, pytest.mark.kafka, pytest.mark.timeout(300)]
COUNT = 120
WAIT_S = 120.0


class Fleet:
    """Worker processes on one prefix; what each began to handle lies in a file."""

    def __init__(self, bootstrap: str, prefix: str, folder: Path) -> None:
        self.bootstrap, self.prefix, self.folder = bootstrap, prefix, folder
        self.running = ExitStack()

    def start(self, way: str, member: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.contract.log_worker", self.bootstrap, self.prefix, way, member]
        with (self.folder / member).open("wb") as out, (self.folder / f"{member}.err").open("wb") as err:
            process = subprocess.Popen(command, stdout=out, stderr=err)
        self.running.callback(process.wait)
        self.running.callback(process.kill)
        return process

    def began(self, member: str) -> list[int]:
        return [int(line) for line in (self.folder / member).read_text().split("\n")[:-1]]


@pytest.fixture
def fleet(kafka_bootstrap: str, tmp_path: Path) -> Iterator[Fleet]:
    made = Fleet(kafka_bootstrap, f"k{uuid.uuid4().hex[:8]}.", tmp_path)
    with made.running:
        yield made


@pytest.fixture
async def log(fleet: Fleet) -> AsyncIterator[Log]:
    opened = open_log(f"kafka:{fleet.bootstrap}", prefix=fleet.prefix)
    await opened.start()
    await opened.apply_topics(TOPICS)
    yield opened
    await opened.close()


async def written(log: Log) -> Counter[str]:
    records = [delivered.record() for delivered in await everything(log, "ledger")]
    return Counter(record.rollout_id for record in records if isinstance(record, LedgerEntry))


async def until_all_written(log: Log, distinct: int) -> None:
    async def all_written() -> bool:
        return len(await written(log)) >= distinct

    await until(all_written, f"{distinct} entries", WAIT_S)


async def two_members(fleet: Fleet, log: Log, way: str) -> subprocess.Popen[bytes]:
    """Start `a` and `b`, wait until both own partitions; returns `a`."""
    first = fleet.start(way, "a")
    fleet.start(way, "b")

    async def both() -> bool:
        return any(len(group.members) == 2 and all(group.members.values()) for group in await log.groups())

    await until(both, "two members", WAIT_S)
    return first


async def until_begun(fleet: Fleet, count: int) -> None:
    """Until both processes have begun this many messages."""
    await until(lambda: min(len(fleet.began("a")), len(fleet.began("b"))) >= count, f"{count} by each", WAIT_S)


async def finished_in_commits(log: Log) -> set[int]:
    """Scores that the group's committed places say are finished."""
    commits = await log.commits("w")
    trackers = {partition: Tracker(place) for partition, place in commits.items()}
    done = set()
    for delivered in await everything(log, "rewards"):
        record, tracker = delivered.record(), trackers.get(delivered.position.topic_partition)
        assert isinstance(record, Reward)
        if tracker is not None and not tracker.take(delivered.position.offset):
            done.add(int(record.score))
    return done


async def test_work_survives_kill_9(fleet: Fleet, log: Log) -> None:
    first = await two_members(fleet, log, "work")
    await log.publish(*[reward(number, f"g{number % 30}") for number in range(COUNT)])
    await until_begun(fleet, 10)
    done = await finished_in_commits(log)
    before = set(fleet.began("b"))
    assert first.poll() is None
    first.kill()
    await until_all_written(log, COUNT)
    counts = await written(log)
    assert counts.keys() == {str(number) for number in range(COUNT)}
    assert (set(fleet.began("b")) - before).isdisjoint(done)
    assert len(done) > 0
    assert sum(counts.values()) - COUNT <= 4
    assert set(fleet.began("a")) | set(fleet.began("b")) == set(range(COUNT))


async def test_no_group_comes_twice_after_kill_9(fleet: Fleet, log: Log) -> None:
    groups = [f"g{number}" for number in range(COUNT // SIZE)]
    records = [reward(index * SIZE + i, group) for index, group in enumerate(groups) for i in range(SIZE)]
    random.Random(5).shuffle(records)
    first = await two_members(fleet, log, "transform")
    await log.publish(*records)
    await until_begun(fleet, 10)
    assert first.poll() is None
    first.kill()
    await until_all_written(log, len(groups))
    assert await written(log) == Counter(groups)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "no-such-host.invalid:9092"])
async def test_a_broker_that_is_not_there_is_said_at_start(address: str) -> None:
    with pytest.raises(LogUnavailable, match=f"no Kafka answers at {address}"):
        await open_log(f"kafka:{address}").start()


async def test_writers_and_readers_live_through_kill_9_of_the_broker(tmp_path: Path, kafka_bootstrap: str) -> None:
    with own_broker(tmp_path) as bootstrap:
        log = open_log(f"kafka:{bootstrap}")
        await log.start()
        await log.apply_topics(TOPICS)
        got: list[float] = []

        async def read() -> None:
            async with log.follow(["rewards"]) as follower:
                while len(got) < 40:
                    got.append((await anext(follower)).record().score)  # type: ignore[attr-defined]

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            for number in range(20):
                await log.publish(reward(number))
            kill_broker(tmp_path)
            tasks.start_soon(anyio.to_thread.run_sync, broker.up, tmp_path)
            for number in range(20, 40):
                await log.publish(reward(number), deadline_s=WAIT_S)
            await until(lambda: len(got) == 40, "40 records", WAIT_S)
            tasks.cancel_scope.cancel()
        assert got == list(range(40))
        assert broker.status(tmp_path).bootstrap == bootstrap != kafka_bootstrap
        await log.close()


async def test_both_stages_live_through_kill_9_of_the_broker(tmp_path: Path, kafka_bootstrap: str) -> None:
    """Commits that block, transactions with an unknown outcome: nothing is lost, no group comes twice."""
    groups = [f"g{number}" for number in range(COUNT // SIZE)]
    records = [reward(index * SIZE + i, group) for index, group in enumerate(groups) for i in range(SIZE)]
    worked: Counter[int] = Counter()
    forgive_cut_off_commits()

    async def work(delivered: Delivered) -> Outcome:
        await anyio.sleep(0.01)
        worked[int(delivered.record().score)] += 1  # type: ignore[attr-defined]
        return Emit()

    with own_broker(tmp_path) as bootstrap:
        log, stopping = open_log(f"kafka:{bootstrap}"), anyio.Event()
        await log.start()
        await log.apply_topics(TOPICS)
        common = {"member": "m", "stopping": stopping}
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: run_work(log, ["rewards"], group="w", handler=work, **common))  # type: ignore[arg-type]
            tasks.start_soon(
                lambda: run_transform(
                    log,
                    ["rewards"],
                    group="t",
                    handler=GroupJoin(),
                    remember="ledger",
                    batch=5,
                    **common,  # type: ignore[arg-type]
                )
            )
            await log.publish(*records[: COUNT // 2])
            await until(lambda: len(worked) >= 10, "the first ones", WAIT_S)
            kill_broker(tmp_path)
            await anyio.to_thread.run_sync(broker.up, tmp_path)
            await log.publish(*records[COUNT // 2 :], deadline_s=WAIT_S)
            await until(lambda: len(worked) == COUNT, "all work", WAIT_S)
            await until_all_written(log, len(groups))
            stopping.set()
        assert await written(log) == Counter(groups)
        assert worked == Counter(range(COUNT))
        assert kafka_bootstrap != bootstrap
        await log.close()
