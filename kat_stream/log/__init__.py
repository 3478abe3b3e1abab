"""The log: what flows between the stages, and the one loop that every stage runs.

    log = open_log("memory:") | open_log("kafka:localhost:9092")
    await log.publish(record)                          acknowledged when it returns
    async for delivered in log.follow(["turns"]): ...  read without a group
    await run_work(log, ...), run_transform(log, ...)  consumer groups, restarts, dead letters
Invariant: both logs keep the same promises; the same contract tests run on both. Only "kafka:" imports aiokafka.
"""

from __future__ import annotations

from kat_stream.config import SecuritySection
from kat_stream.errors import ConfigError
from kat_stream.log.base import Committed, Delivered, Follower, Group, Log, Message, Position, TopicPartition
from kat_stream.log.memory import MemoryLog
from kat_stream.log.outcome import Emit, Hold, Outcome, Reject, Retry, TransformHandler, WorkHandler
from kat_stream.log.transform import run_transform
from kat_stream.log.work import run_work
from kat_stream.ranges import LAST_PORT

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


def open_log(
    url: str,
    *,
    prefix: str = PREFIX,
    security: SecuritySection | None = None,
    blobs: str = "",
    blob_limit_bytes: int = 900_000,
    static_member: bool = False,
) -> Log:
    """The log at `memory:` or `kafka:host:port[,host:port]`; call `start` before use and `close` after.

    `prefix` goes before topic, group and transaction names on a broker. `security`: who this process is.
    `blobs`: a store (`file:DIRECTORY`, `s3://BUCKET/PREFIX`) for values over `blob_limit_bytes`; empty: all values are
    on the log. `static_member`: names of members are those of the group (config.LogSection). ConfigError for any other
    URL.
    """
    log = _open(url, prefix, security or SecuritySection(), static_member)
    if not blobs:
        return log
    from kat_stream.log.blobs import BlobStore
    from kat_stream.log.claims import ClaimCheckedLog

    return ClaimCheckedLog(log, BlobStore(blobs), blob_limit_bytes)


def _check_ports(url: str, addresses: str) -> None:
    """An address may have none: aiokafka knows Kafka's own."""
    for address in addresses.split(","):
        _, colon, port = address.strip().rpartition(":")
        if colon and not address.endswith("]") and not (port.isdecimal() and 0 < int(port) <= LAST_PORT):
            raise ConfigError(f"log: {url!r}: {port!r} is no port")


def _open(url: str, prefix: str, security: SecuritySection, static_member: bool) -> Log:
    scheme, _, rest = url.partition(":")
    if scheme == "memory" and not rest:
        return MemoryLog()
    if scheme == "kafka" and rest:
        from kat_stream.log.kafka import KafkaLog
        from kat_stream.log.security import connection_options

        _check_ports(url, rest)
        options = connection_options(security)
        return KafkaLog(rest, prefix=prefix, security=options, static_member=static_member)
    raise ConfigError(f"log: {url!r} is neither memory: nor kafka:host:port[,host:port]")
