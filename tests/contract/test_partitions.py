"""`log.partitions`: with 2 and with 24 partitions groups stay together and complete; another count is refused."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import AsyncIterator

import anyio
import pytest

from consumers.packer import PackerHandler
from kat_stream.config import load
from kat_stream.errors import ConfigError, LogError
from kat_stream.gateway.recording import record as record_turn
from kat_stream.log import Log, open_log, run_transform
from kat_stream.observe.sources import LogSource
from kat_stream.rl.group import GroupRules
from kat_stream.versions import Versions
from tests.conftest_kafka import kafka_bootstrap
from tests.contract.log_records import everything, until_written
from tests.contract.test_bad_input import members
from tests.unit.records import RUN, request, turn
from topics import CATALOGUE, LedgerEntry, PolicyVersion, catalogue, partition_of

__all__ = ["kafka_bootstrap"]
NAMES = ("turns", "trajectories", "rewards", "batches", "ledger", "groups.closed", "policy.versions", "dead.letters")
GROUPS = [f"{RUN}-t{number:06d}" for number in range(8)]
WAIT_S = 60.0


@pytest.fixture(params=[2, 24])
def partitions(request: pytest.FixtureRequest) -> int:
    count: int = request.param
    return count


@pytest.fixture(params=["memory", pytest.param("kafka", marks=pytest.mark.kafka)])
async def log(request: pytest.FixtureRequest, partitions: int) -> AsyncIterator[Log]:
    url = "memory:" if request.param == "memory" else f"kafka:{request.getfixturevalue('kafka_bootstrap')}"
    log = open_log(url, prefix=f"t{uuid.uuid4().hex[:8]}.")
    await log.start()
    await log.apply_topics([topic for topic in catalogue(partitions) if topic.name in NAMES])
    yield log
    await log.close()


@pytest.mark.anyio
async def test_groups_are_packed_whole_and_other_counts_are_refused(log: Log, partitions: int) -> None:
    await log.publish(PolicyVersion(run=RUN, model="m", lineage="a", number=0, path="", checksum=""))
    for group in GROUPS:
        asked = request(group, 0)
        await record_turn(log, turn(asked, [1], [2]), WAIT_S)
        await log.publish(*members(group))
    await pack_all(log, partitions)
    kinds: Counter[str] = Counter()
    used = set()
    for topic in ("turns", "trajectories", "rewards", "batches", "ledger", "groups.closed"):
        for delivered in await everything(log, topic):
            record = delivered.record()
            assert delivered.position.partition == partition_of(record, partitions), delivered.position
            used.add(delivered.position.partition)
            kinds[topic] += 1
            assert not isinstance(record, LedgerEntry) or record.state == "packed"
    assert kinds == {"turns": 8, "trajectories": 16, "rewards": 16, "batches": 8, "ledger": 16, "groups.closed": 8}
    assert await everything(log, "dead.letters") == []
    assert len(used) == len({partition_of(members(group)[0], partitions) for group in GROUPS}) > 1
    traced = LogSource(log, "here", RUN).messages(["turns", "rewards"], GROUPS[3])
    found = [one.record().group_id async for one in traced]  # type: ignore[attr-defined]
    assert found.count(GROUPS[3]) == 3
    with pytest.raises(LogError, match=rf"has {partitions} partitions"):
        await log.apply_topics(CATALOGUE)


async def pack_all(log: Log, partitions: int) -> None:
    """The packer's stage until every group has its batch."""
    versions, stopping = Versions(RUN), anyio.Event()
    await versions.load(log)
    rules = GroupRules(staleness=2, budget_tokens=256)
    handler = PackerHandler(RUN, versions, rules, partitions=partitions)

    async def stage() -> None:
        topics = ("trajectories", "rewards")
        await run_transform(
            log, topics, group="p", member="m", handler=handler, stopping=stopping, remember="groups.closed"
        )

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stage)
        await until_written(log, "batches", len(GROUPS))
        stopping.set()


def test_the_setting_is_checked_where_it_is_read() -> None:
    assert load(None, ["log.partitions=48"]).log.partitions == 48
    assert {topic.partitions for topic in catalogue(48)} == {1, 48}
    assert catalogue() == CATALOGUE
    with pytest.raises(ConfigError, match=r"log\.partitions is 0"):
        load(None, ["log.partitions=0"])
