"""How this process talks to a broker: address, names, errors, and waits that cannot be cut in half.

Invariant: no aiokafka error leaves kat_stream/log; callers see LogUnavailable (retriable, outcome unknown),
FencedError, DataError or LogError. Topics, groups and transactional ids carry the prefix on the broker, nowhere else.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Awaitable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import aiokafka
import anyio
from aiokafka import errors as kafka_errors
from aiokafka.conn import create_conn, get_ip_port_afi

from kat_stream.errors import AccessDenied, DataError, FencedError, LogError, LogUnavailable
from kat_stream.log.base import TopicPartition
from kat_stream.log.kafka_silent import REQUEST_S

logger = logging.getLogger(__name__)

CONNECT_S = 20.0
ASK_S = 20.0
"""Longer than a few steps of which each meets a node that stands still: see REQUEST_S."""
STOP_S = 5.0
FENCED = (
    kafka_errors.CommitFailedError,
    kafka_errors.IllegalStateError,
    kafka_errors.ProducerFenced,
    kafka_errors.InvalidProducerEpoch,
)
DENIED = (
    kafka_errors.TopicAuthorizationFailedError,
    kafka_errors.GroupAuthorizationFailedError,
    kafka_errors.TransactionalIdAuthorizationFailed,
    kafka_errors.ClusterAuthorizationFailedError,
)
DOOR = (
    kafka_errors.AuthenticationFailedError,
    kafka_errors.SaslAuthenticationFailed,
    kafka_errors.UnsupportedSaslMechanismError,
)
UNAVAILABLE = (
    TimeoutError,
    kafka_errors.KafkaConnectionError,
    kafka_errors.KafkaTimeoutError,
    kafka_errors.OutOfOrderSequenceNumber,
    kafka_errors.ProducerClosed,
)
RETRIABLE = tuple(
    name for name, kind in vars(kafka_errors).items() if isinstance(kind, type) and getattr(kind, "retriable", False)
)
"""Names of the errors that aiokafka calls retriable."""
NO_NODES = "Did we not perform bootstrap?"
"""What aiokafka asserts when it looks for a coordinator and the broker has not named any: one that just starts."""


@dataclass(frozen=True, slots=True)
class Broker:
    """Where the broker is and how to speak to it."""

    bootstrap: str
    prefix: str = "kat."
    security: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """aiokafka's connection options: security_protocol, ssl_context, sasl_*."""
    session_timeout_ms: int = 6000
    """A member that is silent this long is dead; its partitions move."""
    heartbeat_interval_ms: int = 1000
    max_poll_interval_ms: int = 300_000
    """A member that does not poll this long is dead although its heart beats."""
    static_member: bool = False
    """Every member's name has exactly one live holder (a StatefulSet's pod), which keeps its partitions through a
    restart. Two of one name take the partitions from each other for ever (research/kafka_real.md 1.5)."""
    partitions: dict[str, int] = field(default_factory=dict, repr=False)
    """Of each topic (the broker's name), as this process first saw it: if an operator adds some, all records of a group
    still meet in one."""

    def options(self, retry_backoff_ms: int = 20) -> dict[str, Any]:
        return {"bootstrap_servers": self.bootstrap, "retry_backoff_ms": retry_backoff_ms, **self.security}

    @property
    def principal(self) -> str:
        """Who we are to the broker, as its access lists name users."""
        name = self.security.get("sasl_plain_username", "")
        return f"User:{name}" if name else "this client (by its certificate, or anonymous)"

    @contextmanager
    def translated(self, what: str, operation: str = "Describe") -> Iterator[None]:
        """aiokafka's errors as ours; `what` says what was tried, `operation` what right it takes."""
        try:
            with translated(what):
                yield
        except LogError as error:
            if isinstance(error.__cause__, DENIED):
                resource = _resource(error.__cause__, self.prefix)
                raise AccessDenied(self.principal, operation, resource, what) from error.__cause__
            raise

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
    except (kafka_errors.KafkaError, TimeoutError, AssertionError) as error:
        if _passing(error):
            raise LogUnavailable(f"{what}: {_text(error)}") from error
        if isinstance(error, AssertionError):
            raise  # a broken invariant, of aiokafka's or ours
        raise LogError(f"{what}: {_text(error)}") from error


def _passing(error: BaseException | None) -> bool:
    """Whether it may be well later. aiokafka's background tasks wrap what they met: by its text, or as the cause."""
    if isinstance(error, AssertionError):
        return str(error) == NO_NODES
    if error is not None and type(error) is kafka_errors.KafkaError:
        return any(said in str(error) for said in (*RETRIABLE, NO_NODES)) or _passing(error.__cause__)
    return isinstance(error, UNAVAILABLE) or getattr(error, "retriable", False)


def _resource(error: BaseException, prefix: str) -> str:
    """`topic kat.turns` of a refusal. aiokafka gives one name, a set of names, or none."""
    kind = type(error).__name__.partition("Authorization")[0]
    kind = {"TransactionalId": "transactional id"}.get(kind, kind.lower())
    given = error.args[0] if error.args else ""
    names = sorted(given) if isinstance(given, list | set | frozenset | tuple) else [str(given)]
    return f"{kind} {', '.join(name for name in names if name) or f'(under {prefix})'}"


def _text(error: BaseException) -> str:
    """With its name, which aiokafka's errors say themselves."""
    name, said = type(error).__name__, str(error)
    return said if name in said else f"{name} {said}".strip()


async def refused_at_the_door(broker: Broker) -> None:
    """Say why a secured broker did not let us in, if that is the reason: aiokafka only says `Unable to bootstrap`.

    AccessDenied: user, password or mechanism. LogError: the certificates, or a broker that does not speak TLS there.
    """
    if not broker.security:
        return
    host, port, _ = get_ip_port_afi(broker.bootstrap.split(",")[0])
    what = f"{broker.bootstrap} does not let us in"
    try:
        async with asyncio.timeout(CONNECT_S):
            connection = await create_conn(host, port, request_timeout_ms=int(REQUEST_S * 1000), **broker.security)
        connection.close()
    except DOOR as error:
        raise AccessDenied(broker.principal, "log in to", f"this cluster ({_text(error)})", what) from error
    except ssl.SSLError as error:
        raise LogError(f"{what}: TLS: {_text(error)}; see log.security.ca_file and cert_file") from error
    except (OSError, kafka_errors.KafkaError):
        return  # nobody is there: the caller says so


async def stopped(stop: Awaitable[object]) -> bool:
    """Stop a client, but never wait long: with the broker gone there is nobody to say goodbye to.

    Whether it came to its end by itself. In a task of its own: aiokafka passes on cancellations of its own tasks.
    """
    stopping = asyncio.ensure_future(stop)
    with anyio.CancelScope(shield=True):
        await asyncio.wait([stopping], timeout=STOP_S)
        if not stopping.done():
            stopping.cancel()
            await asyncio.wait([stopping], timeout=STOP_S)
    if not stopping.done() or stopping.cancelled():
        return False
    error = stopping.exception()
    if isinstance(error, kafka_errors.KafkaError):  # of a background task: whoever needed its work was told already
        logger.info("while closing: %s", _text(error))
    elif error is not None:
        raise error
    return error is None
