"""Real Kafka for the tests: a broker and a cluster of three, each one a session, started on first use."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from kat_stream.log import broker

NODES = 3


def need_java() -> None:
    """Skip where the environment cannot run a broker, or an S3 server."""
    if shutil.which("java") is None or shutil.which("mvn") is None:
        pytest.skip("environment: servers of the JVM need Java 17 and Maven")


@pytest.fixture(scope="session")
def kafka_bootstrap(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`host:port` of a running broker; tests keep apart by topic prefix."""
    need_java()
    state = tmp_path_factory.mktemp("broker")
    try:
        yield broker.up(state)
    finally:
        broker.down(state)


@pytest.fixture(scope="session")
def kafka_cluster_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """State directory of the cluster; use `kafka_cluster`, which heals it between tests."""
    need_java()
    state = tmp_path_factory.mktemp("cluster")
    try:
        broker.up(state, nodes=NODES)
        yield state
    finally:
        broker.down(state)


@pytest.fixture
def kafka_cluster(kafka_cluster_dir: Path) -> Iterator[broker.Cluster]:
    """Three brokers, RF 3 and min ISR 2; a test may kill, pause or stop nodes, they are started again after it."""
    cluster = broker.cluster_of(kafka_cluster_dir)
    assert cluster is not None
    try:
        yield cluster
    finally:
        for node in cluster.nodes:
            node.resume()
        broker.up(kafka_cluster_dir)
