"""How this process talks to a broker: address, names, errors, and waits that cannot be cut in half.

Invariant: no aiokafka error leaves kat_stream/log; callers see LogUnavailable (retriable, outcome unknown),
FencedError, DataError or LogError. Topics, groups and transactional ids carry the prefix on the broker, nowhere else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import aiokafka
import anyio
from aiokafka import errors as kafka_errors

from kat_stream.errors import DataError, FencedError, LogError, LogUnavailable
from kat_stream.log.base import TopicPartition

CONNECT_S = 15.0
STOP_S = 5.0
FENCED = (
    kafka_errors.CommitFailedError,
    kafka_errors.IllegalStateError,
    kafka_errors.ProducerFenced,
    kafka_errors.InvalidProducerEpoch,
)
UNAVAILABLE = (
    TimeoutError,
    kafka_errors.KafkaConnectionError,
    kafka_errors.KafkaTimeoutError,
    kafka_errors.OutOfOrderSequenceNumber,
    kafka_errors.ProducerClosed,
)


@dataclass(frozen=True, slots=True)
class Broker:
    """Where the broker is and how to speak to it."""

    bootstrap: str
    prefix: str = "kat."
    security: Mapping[str, Any] = field(default_factory=dict)
    """aiokafka's connection options: security_protocol, ssl_context, sasl_*."""
    session_timeout_ms: int = 6000
    """A member that is silent this long is dead; its partitions move."""
    heartbeat_interval_ms: int = 1000

    def options(self, retry_backoff_ms: int = 20) -> dict[str, Any]:
        return {"bootstrap_servers": self.bootstrap, "retry_backoff_ms": retry_backoff_ms, **self.security}

    def named(self, name: str) -> str:
        """The broker's name for a topic, group or transaction of ours."""
        return self.prefix + name

    def there(self, partition: TopicPartition) -> aiokafka.TopicPartition:
        return aiokafka.TopicPartition(self.named(partition.topic), partition.partition)

    def here(self, partition: aiokafka.TopicPartition) -> TopicPartition:
        return TopicPartition(partition.topic.removeprefix(self.prefix), partition.partition)


@contextmanager
def translated(what: str) -> Iterator[None]:
    """aiokafka's errors as ours; `what` says what was tried."""
    try:
        yield
    except FENCED as error:
        raise FencedError(f"{what}: {_text(error)}") from error
    except kafka_errors.MessageSizeTooLargeError as error:
        raise DataError(f"{what}: {_text(error)}") from error
    except UNAVAILABLE as error:
        raise LogUnavailable(f"{what}: {_text(error)}") from error
    except kafka_errors.KafkaError as error:
        kind = LogUnavailable if error.retriable else LogError
        raise kind(f"{what}: {_text(error)}") from error


def _text(error: BaseException) -> str:
    return f"{type(error).__name__} {error}".strip()


async def whole[T](work: Coroutine[Any, Any, T]) -> T:
    """Run `work` to its end even if the caller is cancelled, then pass the cancellation on.

    `work` must bound itself. A poll or a commit that is cut in half leaves aiokafka or the transaction undefined
    (research/kafka_real.md 2.4, 3.10).
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        with anyio.CancelScope(shield=True):
            await asyncio.wait([task])
        if not task.cancelled():
            task.exception()
        raise


async def stopped(stop: Awaitable[object]) -> None:
    """Stop a client, but never wait long: with the broker gone there is nobody to say goodbye to."""
    with anyio.move_on_after(STOP_S, shield=True):
        await stop
