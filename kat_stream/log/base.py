"""What a log is: the protocol that memory.py and kafka.py keep, and the values that cross it.

Invariant: `publish` returns only when every record is acknowledged, and order is kept per partition. Names on this side
are catalogue names (`turns`); a prefix, where there is one, is the implementation's own business.
Callers outside kat_stream/log use publish, follow and the offset queries; membership and writers belong to the loops.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, Self

import msgspec

from kat_stream.errors import DecodeError
from topics.catalogue import Topic
from topics.record import Record, decode_any


class TopicPartition(NamedTuple):
    """One partition of a topic; equal to the plain tuple."""

    topic: str
    partition: int


class Position(NamedTuple):
    """Where one message lies."""

    topic: str
    partition: int
    offset: int

    @property
    def topic_partition(self) -> TopicPartition:
        return TopicPartition(self.topic, self.partition)

    def __str__(self) -> str:
        return f"{self.topic}[{self.partition}]@{self.offset}"


@dataclass(frozen=True, slots=True)
class Message:
    """Bytes on their way to a partition."""

    topic: str
    partition: int
    """Any number from 0 on: the log takes it modulo the number of the topic's partitions."""
    key: bytes | None
    value: bytes
    headers: Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class Delivered:
    """A message as it came from the log."""

    position: Position
    key: bytes | None
    value: bytes
    headers: Mapping[str, bytes]
    timestamp_ms: int

    def record(self) -> Record:
        """The record inside; DecodeError names the position, the record and the field."""
        name = self.headers.get("record", b"").decode(errors="replace")
        if not name:
            raise DecodeError(f"{self.position}: no `record` header says what these {len(self.value)} bytes are")
        if reference := self.headers.get("blob"):
            place = reference.decode(errors="replace")
            raise DecodeError(f"{self.position}: its value is {place}, in a store that this reader was not given")
        try:
            return decode_any(name, self.value)
        except KeyError:
            raise DecodeError(f"{self.position}: this build does not know the record {name!r}") from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise DecodeError(f"{self.position}: not a {name}: {error}") from error


class Committed(NamedTuple):
    """A group's place in a partition: everything below `offset` is done; `metadata` says what is done beyond it."""

    offset: int
    metadata: str = ""


@dataclass(frozen=True, slots=True)
class Group:
    """A group and who is in it; `members` maps a member's name to what it owns."""

    name: str
    state: str
    members: Mapping[str, tuple[TopicPartition, ...]] = field(default_factory=dict)


Start = Literal["earliest", "latest"] | Mapping[tuple[str, int], int]
"""Where to begin reading; partitions that a mapping leaves out begin at the earliest message."""

OnRevoked = Callable[[frozenset[TopicPartition]], Coroutine[Any, Any, None]]


class Follower(Protocol):
    """A reader without a group. `async for` goes on for ever: a tail."""

    def __aiter__(self) -> Self: ...
    async def __anext__(self) -> Delivered: ...
    async def __aenter__(self) -> Self: ...
    async def __aexit__(self, *exc: object) -> None: ...

    async def open(self) -> None:
        """Fix the start positions now; otherwise the first read does. `latest` means the end at this moment."""

    async def poll(self, timeout_s: float) -> list[Delivered]:
        """What is there, or what comes within `timeout_s`; LogError if retention removed what was to be read next."""

    def catch_up(self, deadline_s: float = 60.0) -> AsyncIterator[Delivered]:
        """Everything up to the end offsets at call time, then it ends; DeadlineExceeded."""

    async def caught_up(self) -> bool:
        """Whether everything up to the end offsets at call time was handed out."""

    def position(self) -> dict[TopicPartition, int]:
        """The next offset to be handed out, per partition; empty before the start is fixed."""

    async def aclose(self) -> None: ...


class Member(Protocol):
    """One member of a consumer group. The group's partitions move only between two polls of its loop."""

    @property
    def epoch(self) -> int:
        """Grows whenever the assignment changes."""

    @property
    def assigned(self) -> frozenset[TopicPartition] | None:
        """What this member owns; None while partitions move."""

    async def poll(self, *, limit: int, timeout_s: float) -> list[Delivered]:
        """Up to `limit` messages, the oldest over all partitions first; nothing if the assignment changed meanwhile.

        Never cancelled half-way.
        """

    async def keep_alive(self) -> None:
        """Tell the group that the loop lives although it takes nothing."""

    def seek(self, partition: TopicPartition, offset: int) -> None: ...

    def pause(self, partition: TopicPartition) -> None:
        """Poll nothing from this partition until `resume`, or until the assignment changes."""

    def resume(self, partition: TopicPartition) -> None: ...

    async def position(self, partition: TopicPartition) -> int | None:
        """The next offset to be polled, past transaction markers; None if the partition is not ours any more."""

    async def commit(self, commits: Mapping[TopicPartition, Committed]) -> None:
        """FencedError if the partitions moved; LogUnavailable if the broker did not answer in time."""

    async def leave(self) -> None:
        """Leave the group; `on_revoked` is not called."""


class Writer(Protocol):
    """The one writer of a transactional id. Opening another with the same id fences this one."""

    async def commit(self, messages: Sequence[Message], commits: Mapping[TopicPartition, Committed]) -> None:
        """Messages and offsets in one transaction. FencedError; LogUnavailable: outcome unknown, open anew."""

    async def close(self) -> None: ...


class Log(Protocol):
    """The event log."""

    async def start(self) -> None:
        """LogUnavailable if there is no log at the address."""

    async def close(self) -> None: ...

    async def apply_topics(self, topics: Iterable[Topic]) -> list[str]:
        """Create what is missing and name it; LogError if a topic exists with another partition count."""

    async def publish(self, *records: Record, deadline_s: float = 30.0) -> None:
        """Route by the catalogue; return when all are acknowledged.

        DataError: a record is larger than its topic allows. LogError: the topic does not exist.
        LogUnavailable: no acknowledgement within `deadline_s`; the records may still be written.
        """

    async def append(self, *messages: Message, deadline_s: float = 30.0) -> None:
        """As `publish`, for bytes that are sealed already (replays, dead letters)."""

    def follow(
        self,
        topics: Sequence[str],
        *,
        start: Start = "earliest",
        partitions: Sequence[int] | None = None,
        poll_s: float = 0.2,
    ) -> Follower:
        """Read without a group. `poll_s`: how long one wait inside the tail lasts."""

    async def end_offsets(self, topic: str) -> dict[int, int]:
        """One past the last readable message, per partition."""

    async def high_watermarks(self, topic: str) -> dict[int, int]:
        """One past the last message, also of transactions that are open: what lies between may become readable."""

    async def beginning_offsets(self, topic: str) -> dict[int, int]: ...

    async def committed(self, group: str) -> dict[TopicPartition, int]:
        """A group's places, for onlookers: one that an open transaction is about to move is given as it was."""

    async def commits(self, group: str) -> dict[TopicPartition, Committed]:
        """Places with their metadata, for who goes on from there: waits for transactions that are about to move one."""

    async def topics(self) -> dict[str, int]:
        """Topics that exist, with their partition counts."""

    async def groups(self) -> list[Group]: ...

    async def join(
        self, topics: Sequence[str], *, group: str, member: str, on_revoked: OnRevoked, together: bool = False
    ) -> Member:
        """Join a group. `together`: equal partition numbers of all topics go to the same member (a join by key).

        `on_revoked` runs before partitions move; the group waits for it.
        """

    async def writer(self, writer_id: str, *, group: str) -> Writer:
        """Open the writer of this id and fence any earlier one; its committed transactions are visible on return.

        If this log has a member in `group`, offsets are committed as what that member was when it polled last: after it
        lost its partitions they are refused (FencedError), whatever the writer's id.
        """
