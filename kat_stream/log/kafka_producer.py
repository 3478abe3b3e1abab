"""Writing to a broker: the idempotent producer behind `publish`, and the transactional writer of a partition.

Invariant: a producer whose state is in doubt is thrown away, never used again: one record that the broker rejects
poisons it for good (research/kafka_real.md 12.1). A message that nobody acknowledged in time is still on its way, as
aiokafka tries for ever (5.5): the same message, appended again, waits for that copy and adds none, so that an outage,
however long, leaves one copy and not one for every attempt.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping, Sequence
from hashlib import blake2b
from typing import Any

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError, ProducerClosed, UnknownTopicOrPartitionError
from aiokafka.producer import sender
from aiokafka.structs import OffsetAndMetadata

from kat_stream.errors import DataError, LogError, LogUnavailable
from kat_stream.log.base import Committed, Message, TopicPartition
from kat_stream.log.kafka_client import CONNECT_S, Broker, stopped
from kat_stream.log.kafka_generation import NOBODY, bind
from kat_stream.log.kafka_member import KafkaMember
from kat_stream.log.kafka_silent import wary
from kat_stream.log.kafka_unacknowledged import unacknowledged
from kat_stream.log.message import OVERHEAD, largest
from kat_stream.whole import whole
from topics.catalogue import CATALOGUE

logger = logging.getLogger(__name__)

MAX_REQUEST = max(largest(topic) for topic in CATALOGUE) + OVERHEAD // 2
"""Below every limit that `check` did not test: our own check comes first, per topic."""
BATCH = 256 * 1024
UNKNOWN = 10_000
"""How many messages of unknown outcome are remembered."""
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


async def _handed_over(producer: AIOKafkaProducer, broker: Broker, m: Message) -> asyncio.Future[Any]:
    """The future of a message's acknowledgement."""
    topic = broker.named(m.topic)
    if topic not in broker.partitions:
        broker.partitions[topic] = len(await producer.partitions_for(topic))
    partition = m.partition % broker.partitions[topic]
    acknowledged: asyncio.Future[Any] = await producer.send(
        topic, m.value, m.key, partition=partition, headers=list(m.headers.items())
    )
    return acknowledged


async def _acknowledged(pending: Collection[asyncio.Future[Any]]) -> None:
    """Wait for all; the first error is raised after all have ended. A cancellation leaves them on their way."""
    if pending:
        await asyncio.wait(pending)
    for error in [future.exception() for future in pending]:
        if error is not None:
            raise error


async def _send(producer: AIOKafkaProducer, broker: Broker, messages: Sequence[Message]) -> None:
    """Hand over in order, then wait for all acknowledgements."""
    await _acknowledged([await _handed_over(producer, broker, message) for message in messages])


class KafkaPublisher:
    """An idempotent producer that is replaced when its state is in doubt."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._producer: AIOKafkaProducer | None = None
        self._starting = asyncio.Lock()
        self._ending: set[asyncio.Task[None]] = set()
        self._unknown: dict[bytes, asyncio.Future[Any]] = {}
        """Messages of calls that failed, oldest first: they are on their way, or they have arrived."""

    async def append(self, messages: Sequence[Message], deadline_s: float) -> None:
        """LogUnavailable: not acknowledged within `deadline_s`, the messages may still be written."""
        what = f"publishing {len(messages)} messages ({deadline_s:g} s; they may still be written)"
        pending: dict[int, asyncio.Future[Any]] = {}
        with self._broker.translated(what, "Write"), unacknowledged():
            try:
                async with asyncio.timeout(deadline_s):
                    await self._send(messages, pending)
            except BaseException:  # also when cancelled: whoever tries all of them again adds only what is missing
                for number, future in pending.items():
                    self._remember(_digest(messages[number]), future)
                raise

    async def close(self) -> None:
        """Wait for what was handed over, but not for ever."""
        producer, self._producer = self._producer, None
        if producer is not None:
            await _ended(producer, flush=True)
        await asyncio.gather(*self._ending)

    async def _send(self, messages: Sequence[Message], pending: dict[int, asyncio.Future[Any]]) -> None:
        """As `_send`, but a message that is on its way is not handed over again."""
        producer = await self._running()
        try:
            for number, message in enumerate(messages):
                earlier = self._unknown.pop(_digest(message), None) if self._unknown else None
                pending[number] = earlier or await _handed_over(producer, self._broker, message)
            await _acknowledged(pending.values())
        except UnknownTopicOrPartitionError:  # no node said who leads a topic: this message was not handed over
            raise
        except Exception:  # whatever it is: this producer is not used again, and it is raised again
            self._discard(producer)
            raise

    def _remember(self, message: bytes, future: asyncio.Future[Any]) -> None:
        def forget_if_lost(done: asyncio.Future[Any]) -> None:
            if (done.cancelled() or done.exception()) and self._unknown.get(message) is done:
                del self._unknown[message]

        self._unknown[message] = future
        future.add_done_callback(forget_if_lost)
        if len(self._unknown) > UNKNOWN:
            del self._unknown[next(iter(self._unknown))]

    async def _running(self) -> AIOKafkaProducer:
        async with self._starting:
            if self._producer is None:
                producer = wary(AIOKafkaProducer(**_options(self._broker, 20), enable_idempotence=True))
                await _started(producer)
                self._producer = producer
            return self._producer

    def _discard(self, producer: AIOKafkaProducer) -> None:
        if self._producer is producer:
            logger.warning("the producer is replaced after an error")
            self._producer = None
            task = asyncio.ensure_future(_ended(producer, flush=True))
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)


def _digest(message: Message) -> bytes:
    """Equal for messages that are the same one, tried again: each sealing has a span of its own in its headers."""
    place = f"{message.topic} {message.partition}".encode()
    hashed = blake2b(place, digest_size=16)
    for part in (message.key or b"", message.value, *message.headers.values()):
        hashed.update(len(part).to_bytes(8))
        hashed.update(part)
    return hashed.digest()


async def _started(producer: AIOKafkaProducer) -> None:
    try:
        async with asyncio.timeout(CONNECT_S):
            await producer.start()
    except BaseException:  # also when cancelled: nothing stays behind, and it is raised again
        await stopped(producer.stop())
        raise


async def _ended(producer: AIOKafkaProducer, *, flush: bool) -> None:
    """Stop; `flush`: give what was handed over a moment to be acknowledged.

    aiokafka's own stop waits for all acknowledgements, and leaves a sender that tries for ever if it is cancelled.
    """
    if flush and await stopped(producer.stop()):
        return
    sending = producer._sender.sender_task
    if sending is not None:
        sending.cancel()
        await stopped(producer.client.close())
        sending.cancel()  # it lets requests under way end, but their answers cannot come any more
        await stopped(asyncio.wait([sending]))
    producer._message_accumulator.fail_all(ProducerClosed())
    await stopped(producer.stop())


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
        wary(self._producer)
        bind(self._producer, lambda: member.holder if member is not None else NOBODY)

    async def start(self) -> None:
        with self._broker.translated(f"opening the writer {self._id}", "Write"):
            await _started(self._producer)

    async def commit(self, messages: Sequence[Message], commits: Mapping[TopicPartition, Committed]) -> None:
        """Never cut in half: a cancelled commit may still commit."""
        if self._in_doubt:
            raise LogUnavailable(f"writer {self._id} is in doubt: open it anew")
        with unacknowledged():
            await whole(self._commit(messages, commits))

    async def close(self) -> None:
        """An open transaction is aborted if the broker answers; else the next holder of the id does it."""
        if self._in_doubt:
            await stopped(self._abort())
        await _ended(self._producer, flush=not self._in_doubt)

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
