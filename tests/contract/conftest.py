"""Both logs behind one fixture: `connect` gives clients of the same log, as different processes would have them."""

from __future__ import annotations

import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

import pytest

from kat_stream.log import Log, open_log
from kat_stream.log.memory import MemoryLog
from tests.conftest_kafka import kafka_bootstrap
from topics.catalogue import topic_named

__all__ = ["kafka_bootstrap"]

TOPICS = [topic_named(name) for name in ("rewards", "ledger", "train.steps", "dead.letters")]
logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # it reports ordinary events as errors
Connect = Callable[[], Awaitable[Log]]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(params=["memory", pytest.param("kafka", marks=pytest.mark.kafka)])
async def connect(request: pytest.FixtureRequest) -> AsyncIterator[Connect]:
    """Each call is another client of one fresh log with TOPICS applied."""
    kafka = request.param == "kafka"
    url = f"kafka:{request.getfixturevalue('kafka_bootstrap')}" if kafka else "memory:"
    shared, prefix = MemoryLog(), f"t{uuid.uuid4().hex[:8]}."
    async with AsyncExitStack() as opened:

        async def another() -> Log:
            log = open_log(url, prefix=prefix) if kafka else shared
            await log.start()
            opened.push_async_callback(log.close)
            return log

        await (await another()).apply_topics(TOPICS)
        yield another


@pytest.fixture
async def log(connect: Connect) -> Log:
    return await connect()
