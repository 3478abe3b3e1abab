"""Records to messages: route, key, headers, size.

Invariant: a message that passes `seal` or `check` is accepted by the broker, because one rejected record poisons an
idempotent Kafka producer for its partition (research/kafka_real.md 12.1).
"""

from __future__ import annotations

from functools import cache

from kat_stream.errors import DataError
from kat_stream.log.base import Delivered, Message
from kat_stream.log.trace import traceparent_of
from topics.catalogue import Topic, key_of, spread_of, topic_named, topic_of
from topics.dead_letter import DeadLetter
from topics.deferred import Deferred
from topics.record import Record, encode, header_of

OVERHEAD = 64 * 1024
"""Room for batch framing, headers and incompressible data, between our limit and the broker's."""
WRAPPING = 1 << 20
"""A dead letter or a deferred message holds a whole message of any other topic, plus this."""


@cache
def largest(topic: Topic) -> int:
    """Bytes of key, value and headers that a message may have."""
    return topic.max_message_bytes + (WRAPPING if topic.record in (DeadLetter, Deferred) else 0)


@cache
def _header(kind: type[Record]) -> bytes:
    return header_of(kind).encode()


def seal(record: Record) -> Message:
    """The message of a record; DataError if it is larger than its topic allows."""
    topic = topic_of(record)
    headers = {"record": _header(type(record)), "traceparent": traceparent_of(record)}
    message = Message(topic.name, spread_of(record), key_of(record), encode(record), headers)
    check(message)
    return message


def check(message: Message) -> None:
    """DataError for what a broker would reject: no topic of ours, too large, or no key on a compacted topic."""
    try:
        topic = topic_named(message.topic)
    except KeyError:
        raise DataError(f"this build knows no topic {message.topic!r}") from None
    if (size := size_of(message)) > largest(topic):
        raise DataError(f"{message.topic}: {size} bytes, the topic takes {largest(topic)}")
    if topic.cleanup == "compact" and not message.key:
        raise DataError(f"{message.topic}: a message of a compacted topic needs a key")


def size_of(message: Message | Delivered) -> int:
    """Bytes of value, key and headers."""
    headers = sum(len(name) + len(text) for name, text in message.headers.items())
    return len(message.value) + len(message.key or b"") + headers
