"""A broker of one node and a cluster of three: started twice, stopped, killed and paused node by node."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from kat_stream.errors import LogUnavailable
from kat_stream.log import Log, broker, open_log
from kat_stream.log.broker_node import listed
from tests.conftest_kafka import need_java
from topics.catalogue import topic_named
from topics.train_step import TrainStep

pytestmark = [pytest.mark.kafka, pytest.mark.anyio]


def step(number: int) -> TrainStep:
    return TrainStep(
        run="r", lineage="l", step=number, metrics={}, groups=(), trained=(), stale=(), positions={}, unix_s=0.0
    )


async def opened(cluster: broker.Cluster) -> Log:
    log = open_log(f"kafka:{cluster.bootstrap}", prefix=f"t{uuid.uuid4().hex[:8]}.")
    await log.start()
    await log.apply_topics([topic_named("train.steps")])
    return log


async def steps_in(log: Log) -> list[int]:
    async with log.follow(["train.steps"]) as follower:
        return [d.record().step async for d in follower.catch_up(60.0)]  # type: ignore[attr-defined]


def test_up_twice_down_and_up_again_keeps_address_and_identity(tmp_path: Path) -> None:
    need_java()
    try:
        bootstrap = broker.up(tmp_path)
        before = broker.status(tmp_path)
        assert broker.up(tmp_path, nodes=1) == bootstrap
        assert broker.status(tmp_path) == before
        assert (tmp_path / "node-1" / "server.properties").stat().st_mode & 0o077 == 0
        assert broker.down(tmp_path) is True
        assert broker.status(tmp_path).running is False
        assert broker.up(tmp_path) == bootstrap
    finally:
        broker.down(tmp_path)


async def test_a_cluster_goes_on_without_one_node_and_refuses_to_write_without_two(
    kafka_cluster: broker.Cluster, kafka_cluster_dir: Path
) -> None:
    assert all(listed(node.port) == {1, 2, 3} for node in kafka_cluster.nodes)
    log = await opened(kafka_cluster)
    try:
        await log.publish(step(1))
        kafka_cluster.node(2).kill()
        assert [pid > 0 for _, _, pid in broker.status(kafka_cluster_dir).nodes] == [True, False, True]
        await log.publish(step(2), deadline_s=60)
        kafka_cluster.node(3).pause()
        with pytest.raises(LogUnavailable):
            await log.publish(step(3), deadline_s=5)
        kafka_cluster.node(3).resume()
        kafka_cluster.node(2).start()
        await log.publish(step(4), deadline_s=60)
        found = await steps_in(log)
        assert found[:2] == [1, 2]
        assert found[-1] == 4
    finally:
        await log.close()


def test_up_starts_only_the_node_that_is_missing(kafka_cluster: broker.Cluster, kafka_cluster_dir: Path) -> None:
    kafka_cluster.node(1).stop()
    before = broker.status(kafka_cluster_dir).nodes
    assert broker.up(kafka_cluster_dir) == kafka_cluster.bootstrap
    after = broker.status(kafka_cluster_dir).nodes
    assert after[1:] == before[1:]
    assert after[0][2] > 0
    assert listed(kafka_cluster.node(1).port) == {1, 2, 3}
