"""Two of three brokers gone under a send (research/kafka_real.md 5.5): the deadline is kept, the outcome is called
unknown, the age of the send is a metric; however often it is tried again it is written once, and nothing acknowledged
is lost. With it 1.10 commits and 12.5 closing: nothing waits for a broker that is not there.
"""

from __future__ import annotations

import uuid
from pathlib import Path

import anyio
import pytest
from prometheus_client import REGISTRY

from kat_stream.errors import LogUnavailable
from kat_stream.log import Committed, TopicPartition, broker, kafka_member
from kat_stream.log.kafka import KafkaLog
from kat_stream.log.message import seal
from tests.contract.kafka_kit import owned
from tests.contract.log_records import everything, forgive_cut_off_commits, nothing, reward
from topics import partition_of, topic_named

pytestmark = [pytest.mark.anyio, pytest.mark.kafka, pytest.mark.timeout(300)]
WAIT_S = 120.0
ATTEMPTS = 5


def waiting_s() -> float:
    """What /metrics says about the oldest send."""
    age = REGISTRY.get_sample_value("kat_unacknowledged_seconds")
    assert age is not None
    return age


async def watch(ages: list[float]) -> None:
    while True:
        ages.append(waiting_s())
        await anyio.sleep(0.1)


async def test_5_5_too_few_copies_in_sync(
    kafka_cluster: broker.Cluster, kafka_cluster_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kafka_member, "COMMIT_S", 2.0)
    log = KafkaLog(kafka_cluster.bootstrap, prefix=f"o{uuid.uuid4().hex[:8]}.")
    await log.start()
    await log.apply_topics([topic_named("rewards")])
    place = TopicPartition("rewards", partition_of(reward(0)) % topic_named("rewards").partitions)
    await log.publish(reward(0))
    writer = await log.writer("w", group="z")
    member = await log.join(["rewards"], group="z", member="m", on_revoked=nothing)
    await owned(member, each=12)
    assert waiting_s() == 0
    for number in (2, 3):
        kafka_cluster.node(number).kill()
    result, ages = seal(reward(1)), list[float]()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watch, ages)
        for _ in range(ATTEMPTS):  # as a stage does that has a result
            with pytest.raises(LogUnavailable, match="may still be written") as unknown:
                await log.append(result, deadline_s=1.5)
            assert unknown.value.retriable
        tasks.cancel_scope.cancel()
    assert max(ages) > 1.0
    forgive_cut_off_commits()
    with pytest.raises(LogUnavailable):
        await member.commit({place: Committed(1)})
    await anyio.to_thread.run_sync(broker.up, kafka_cluster_dir)
    await log.append(result, seal(reward(2)), deadline_s=WAIT_S)
    assert waiting_s() == 0
    got = [d.record().score for d in await everything(log, "rewards")]  # type: ignore[attr-defined]
    assert got == [0, 1, 2]  # one copy, and not one for each attempt
    for node in kafka_cluster.nodes:
        node.kill()
    with anyio.fail_after(60):
        await member.leave()
        await writer.close()
        await log.close()
