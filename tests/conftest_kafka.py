"""A real Kafka broker for the tests: one a session, started on first use, stopped at the end."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from kat_stream.log import broker


@pytest.fixture(scope="session")
def kafka_bootstrap(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`host:port` of a running broker; tests keep apart by topic prefix."""
    if shutil.which("java") is None or shutil.which("mvn") is None:
        pytest.skip("environment: a broker needs Java 17 and Maven")
    state = tmp_path_factory.mktemp("broker")
    try:
        yield broker.up(state)
    finally:
        broker.down(state)
