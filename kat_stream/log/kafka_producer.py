"""Writing to a broker: the idempotent producer behind `publish`, and the transactional writer of a partition.

Invariant: a producer whose state is in doubt is thrown away, never used again. One record that the broker rejects, or
an unknown outcome, poisons it for good (research/kafka_real.md 12.1).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError
from aiokafka.producer import sender
from aiokafka.structs import OffsetAndMetadata

from kat_stream.errors import DataError, LogError, LogUnavailable
from kat_stream.log.base import Committed, Message, TopicPartition
from kat_stream.log.kafka_client import CONNECT_S, Broker, stopped, whole
from kat_stream.log.kafka_generation import NOBODY, bind
from kat_stream.log.kafka_member import KafkaMember
from kat_stream.log.message import OVERHEAD, largest
from topics.catalogue import CATALOGUE

logger = logging.getLogger(__name__)

MAX_REQUEST = max(largest(topic) for topic in CATALOGUE) + OVERHEAD // 2
"""Below every limit that `check` did not test: our own check comes first, per topic."""
BATCH = 256 * 1024
COMMIT_S = 30.0
TRANSACTION_TIMEOUT_MS = 45_000
"""Longer than COMMIT_S, so that the broker does not abort under us; a new owner with the same id aborts at once."""

# The default waits 20 ms for the markers of the previous transaction: measured 2.5 times slower (kafka_real.md 3.2).
sender.BACKOFF_OVERRIDE = 0.002


def _options(broker: Broker, retry_backoff_ms: int) -> dict[str, object]:
    return {
        **broker.options(retry_backoff_ms),
        "acks": "all",
        "linger_ms": 0,
        "compression_type": "zstd",
        "max_batch_size": BATCH,
        "max_request_size": MAX_REQUEST,
    }


async def _send(producer: AIOKafkaProducer, broker: Broker, messages: Sequence[Message]) -> None:
    """Hand over in order, then wait for all acknowledgements; the first error is raised after all have ended."""
    pending = []
    for m in messages:
        headers = list(m.headers.items())
        topic = broker.named(m.topic)
        pending.append(await producer.send(topic, m.value, m.key, partition=m.partition, headers=headers))
    for result in await asyncio.gather(*pending, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


class KafkaPublisher:
    """An idempotent producer that is replaced when its state is in doubt."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._producer: AIOKafkaProducer | None = None
        self._starting = asyncio.Lock()
        self._stopping: set[asyncio.Task[None]] = set()

    async def append(self, messages: Sequence[Message], deadline_s: float) -> None:
        """LogUnavailable: not acknowledged within `deadline_s`, the messages may still be written."""
        with self._broker.translated(f"publishing {len(messages)} messages ({deadline_s:g} s)", "Write"):
            async with asyncio.timeout(deadline_s):
                producer = await self._running()
                try:
                    await _send(producer, self._broker, messages)
                except Exception:  # whatever it is: this producer is not used again, and it is raised again
                    self._discard(producer)
                    raise

    async def close(self) -> None:
        """Wait for what was handed over, but not for ever."""
        producer, self._producer = self._producer, None
        if producer is not None:
            await stopped(producer.stop())
        await stopped(asyncio.gather(*self._stopping))

    async def _running(self) -> AIOKafkaProducer:
        async with self._starting:
            if self._producer is None:
                producer = AIOKafkaProducer(**_options(self._broker, 20), enable_idempotence=True)
                await _started(producer)
                self._producer = producer
            return self._producer

    def _discard(self, producer: AIOKafkaProducer) -> None:
        if self._producer is producer:
            logger.warning("the producer is replaced after an error")
            self._producer = None
            self._stop_aside(producer)

    def _stop_aside(self, producer: AIOKafkaProducer) -> None:
        task = asyncio.ensure_future(stopped(producer.stop()))
        self._stopping.add(task)
        task.add_done_callback(self._stopping.discard)


async def _started(producer: AIOKafkaProducer) -> None:
    try:
        async with asyncio.timeout(CONNECT_S):
            await producer.start()
    except BaseException:  # also when cancelled: nothing stays behind, and it is raised again
        await stopped(producer.stop())
        raise


class KafkaWriter:
    """The `Writer` protocol: one transactional producer with a stable id. `start` fences the earlier holder."""

    def __init__(self, broker: Broker, writer_id: str, group: str, member: KafkaMember | None) -> None:
        self._broker = broker
        self._group = group
        self._id = writer_id
        self._in_doubt = False
        self._producer = AIOKafkaProducer(
            **_options(broker, 5),
            transactional_id=broker.named(writer_id),
            transaction_timeout_ms=TRANSACTION_TIMEOUT_MS,
        )
        bind(self._producer, lambda: member.holder if member is not None else NOBODY)

    async def start(self) -> None:
        with self._broker.translated(f"opening the writer {self._id}", "Write"):
            await _started(self._producer)

    async def commit(self, messages: Sequence[Message], commits: Mapping[TopicPartition, Committed]) -> None:
        """Never cut in half: a cancelled commit may still commit."""
        if self._in_doubt:
            raise LogUnavailable(f"writer {self._id} is in doubt: open it anew")
        await whole(self._commit(messages, commits))

    async def close(self) -> None:
        """An open transaction is aborted if the broker answers; else the next holder of the id does it."""
        if self._in_doubt:
            await stopped(self._abort())
        await stopped(self._producer.stop())

    async def _abort(self) -> None:
        try:
            await self._producer.abort_transaction()
        except (KafkaError, AssertionError) as error:  # aiokafka asserts its states: fenced, or committing already
            logger.info("writer %s: nothing to abort: %r", self._id, error)

    async def _commit(self, messages: Sequence[Message], commits: Mapping[TopicPartition, Committed]) -> None:
        try:
            with self._broker.translated(f"transaction of {self._id}", "Write"):
                async with asyncio.timeout(COMMIT_S):
                    await self._transaction(messages, commits)
        except (DataError, LogError):
            self._in_doubt = True
            raise

    async def _transaction(self, messages: Sequence[Message], commits: Mapping[TopicPartition, Committed]) -> None:
        offsets = {self._broker.there(p): OffsetAndMetadata(*place) for p, place in commits.items()}
        await self._producer.begin_transaction()
        await _send(self._producer, self._broker, messages)
        if offsets:
            await self._producer.send_offsets_to_transaction(offsets, self._broker.named(self._group))
        await self._producer.commit_transaction()
