"""Both logs behind one fixture: `connect` gives clients of the same log, as different processes would have them."""

from __future__ import annotations

import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from kat_stream.log import Log, open_log
from kat_stream.log.blobs import BlobStore
from kat_stream.log.claims import ClaimCheckedLog
from kat_stream.log.memory import MemoryLog
from kat_stream.log.retries import IN_PLACE_S, TIERS
from tests.conftest_kafka import kafka_bootstrap, kafka_cluster, kafka_cluster_dir
from topics.catalogue import topic_named

__all__ = ["kafka_bootstrap", "kafka_cluster", "kafka_cluster_dir"]

TOPICS = [topic_named(name) for name in ("rewards", "ledger", "train.steps", "dead.letters", *TIERS)]
logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # it reports ordinary events as errors
Connect = Callable[[], Awaitable[Log]]


LOGS = [
    pytest.param("memory"),
    pytest.param("memory, claims"),
    pytest.param("kafka", marks=pytest.mark.kafka),
    pytest.param("kafka, claims", marks=pytest.mark.kafka),
]
BARE = LOGS[::2]
"""Without claim-check."""
STAGES = LOGS[:3]
"""For what a stage does above the log: claim-check is the same object over either log (test_log.py runs on all)."""
CLAIMED_OVER = 100
"""Bytes: nearly every record of these tests goes through the store."""


@pytest.fixture(params=LOGS)
async def connect(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Connect]:
    """Each call is another client of one fresh log with TOPICS applied."""
    kafka, claims = request.param.startswith("kafka"), request.param.endswith("claims")
    url = f"kafka:{request.getfixturevalue('kafka_bootstrap')}" if kafka else "memory:"
    shared, prefix = MemoryLog(), f"t{uuid.uuid4().hex[:8]}."
    async with AsyncExitStack() as opened:

        async def another() -> Log:
            log = open_log(url, prefix=prefix) if kafka else shared
            if claims:
                log = ClaimCheckedLog(log, BlobStore(f"file:{tmp_path}/blobs"), CLAIMED_OVER)
            await log.start()
            opened.push_async_callback(log.close)
            return log

        await (await another()).apply_topics(TOPICS)
        yield another


@pytest.fixture
def first_tier_s(monkeypatch: pytest.MonkeyPatch) -> float:
    """Seconds that the shortest tier waits in this test: as little as a tier can, not its real 10 s."""
    monkeypatch.setitem(TIERS, "retries.10s", IN_PLACE_S)
    return IN_PLACE_S


@pytest.fixture
async def log(connect: Connect) -> Log:
    return await connect()
