"""What another program may put on a broker's topics and ours would not: compressed giants, headers of its own."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
from aiokafka import AIOKafkaProducer

from kat_stream.log import Delivered, Emit, Outcome
from kat_stream.log.dead_letters import Letter, pending
from kat_stream.log.kafka import KafkaLog
from kat_stream.log.message import seal
from tests.contract.conftest import TOPICS
from tests.contract.log_records import reward, until_committed
from tests.contract.stages_kit import scored, working

pytestmark = [pytest.mark.kafka, pytest.mark.anyio]
GIANT = 50 << 20
Headers = Sequence[tuple[str, bytes | None]]
NAMED: Headers = [("record", b"Reward/1")]
ODD: dict[str, Headers] = {
    "no attempt": [*NAMED, ("attempt", None)],
    "an attempt without end": [*NAMED, ("attempt", b"9" * 5000)],
    "no trace": [*NAMED, ("traceparent", None)],
    "a trace of no letters": [*NAMED, ("traceparent", b"00-\xff\xfe-00-01")],
    "a header without a value": [*NAMED, ("x", None)],
}


class Foreign:
    """Another program's client: it compresses and asks nobody what a message may be."""

    def __init__(self, bootstrap: str, log: KafkaLog) -> None:
        self.log = log
        self._bootstrap = bootstrap

    async def send(self, *messages: tuple[bytes, Headers]) -> None:
        producer = AIOKafkaProducer(
            bootstrap_servers=self._bootstrap, compression_type="gzip", max_request_size=GIANT + (1 << 20)
        )
        await producer.start()
        try:
            for value, headers in messages:
                topic = self.log._broker.named("rewards")
                await producer.send_and_wait(topic, value, b"k", partition=0, headers=list(headers))
        finally:
            await producer.stop()

    async def letters(self) -> list[Letter]:
        return [letter async for letter in pending(self.log, lambda letter: True)]


@pytest.fixture
async def foreign(kafka_bootstrap: str) -> AsyncIterator[Foreign]:
    log = KafkaLog(kafka_bootstrap, prefix=f"t{uuid.uuid4().hex[:8]}.")
    await log.start()
    await log.apply_topics(TOPICS)
    yield Foreign(kafka_bootstrap, log)
    await log.close()


@asynccontextmanager
async def handled(log: KafkaLog) -> AsyncIterator[list[int]]:
    """The scores that a stage was given, whole once it has committed all of the topic at the end of the block."""
    scores: list[int] = []

    async def handle(delivered: Delivered) -> Outcome:
        scores.append(scored(delivered))
        return Emit()

    async with working(log, handle):
        yield scores
        await until_committed(log, "w", "rewards")


async def test_a_compressed_record_of_50_mb_is_a_letter_that_says_where_it_lies(foreign: Foreign) -> None:
    await foreign.send((b"\xc1" + bytes(GIANT), NAMED), (seal(reward(1)).value, NAMED))
    async with handled(foreign.log) as scores:
        pass
    assert scores == [1]
    (letter,) = await foreign.letters()
    assert letter.record.value == b"" and letter.record.left_out > GIANT
    assert letter.record.message.endswith("too large for a letter; they lie at rewards[0]@0)")
    assert "are not in it" in letter.stays


async def test_odd_headers_stop_no_stage_and_come_whole_in_letters(foreign: Foreign) -> None:
    good = [(seal(reward(number)).value, headers) for number, headers in enumerate(ODD.values())]
    await foreign.send(*good, *((b"\xc1", headers) for headers in ODD.values()))
    async with handled(foreign.log) as scores:
        pass
    assert sorted(scores) == list(range(len(ODD)))
    found = [dict(letter.record.headers) for letter in await foreign.letters()]
    assert sorted(map(str, found)) == sorted(str({n: text or b"" for n, text in one}) for one in ODD.values())
