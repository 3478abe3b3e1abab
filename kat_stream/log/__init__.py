"""The log: what flows between the stages, and the one loop that every stage runs.

    log = open_log("memory:") | open_log("kafka:localhost:9092")
    await log.publish(record)                          acknowledged when it returns
    async for delivered in log.follow(["turns"]): ...  read without a group
    await run_work(log, ...), run_transform(log, ...)  consumer groups, restarts, dead letters
Invariant: both logs keep the same promises; the same contract tests run on both. Only "kafka:" imports aiokafka.
"""

from __future__ import annotations

from collections.abc import Mapping

from kat_stream.errors import ConfigError
from kat_stream.log.base import Committed, Delivered, Follower, Group, Log, Message, Position, TopicPartition
from kat_stream.log.memory import MemoryLog
from kat_stream.log.outcome import Emit, Hold, Outcome, Reject, Retry, TransformHandler, WorkHandler
from kat_stream.log.stages import run_transform, run_work

__all__ = [
    "Committed",
    "Delivered",
    "Emit",
    "Follower",
    "Group",
    "Hold",
    "Log",
    "MemoryLog",
    "Message",
    "Outcome",
    "Position",
    "Reject",
    "Retry",
    "TopicPartition",
    "TransformHandler",
    "WorkHandler",
    "open_log",
    "run_transform",
    "run_work",
]

PREFIX = "kat."


def open_log(url: str, *, prefix: str = PREFIX, security: Mapping[str, object] | None = None) -> Log:
    """The log at `memory:` or `kafka:host:port[,host:port]`; call `start` before use and `close` after.

    `prefix` goes before topic, group and transaction names on a broker. `security`: aiokafka's connection options.
    ConfigError for any other URL.
    """
    scheme, _, rest = url.partition(":")
    if scheme == "memory" and not rest:
        return MemoryLog()
    if scheme == "kafka" and rest:
        from kat_stream.log.kafka import KafkaLog

        return KafkaLog(rest, prefix=prefix, security=security or {})
    raise ConfigError(f"log: {url!r} is neither memory: nor kafka:host:port[,host:port]")
