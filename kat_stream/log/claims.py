"""Claim-check: a log whose large values lie in a blob store. `open_log(url, blobs=store)` makes one.

A value over the limit is put into the store first; then a message with no value, and with the header `blob`, goes on
the log. Readers get the value back where it was, so handlers, tail, archive and replay never see the difference.
Invariants: no message refers to a blob that was not there before it; order is kept per partition. While the store is
away, readers wait, as they do for a broker, and lose nothing. A blob that is gone or has other bytes makes its one
message unreadable (`Unresolved`): a dead letter that keeps the reference in its headers.
The header `blobs` names what the value itself refers to, so that a sweep need not fetch it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import anyio

from kat_stream.errors import BlobError, BlobUnavailable, DecodeError
from kat_stream.log.base import (
    Committed,
    Delivered,
    Follower,
    Group,
    Log,
    Member,
    Message,
    OnRevoked,
    Start,
    TopicPartition,
    Writer,
)
from kat_stream.log.blobs import BlobRef, BlobStore, references
from kat_stream.log.follower import BaseFollower
from kat_stream.log.message import check, largest, seal
from topics.catalogue import Topic, topic_named
from topics.record import Record

logger = logging.getLogger(__name__)

LIMIT_BYTES = 900_000
"""Below the 1 MiB that a broker takes by default."""
BLOB, BLOBS = "blob", "blobs"
"""Headers: where the value is; what the value refers to."""
RESOLVE_BYTES = 64 << 20
"""Values that one poll brings into memory, at most, but at least one message."""
RETRY_S = 1.0


@dataclass(frozen=True, slots=True)
class Unresolved(Delivered):
    """A message whose value cannot be had any more; its headers say where it was."""

    why: str = ""

    def record(self) -> Record:
        raise DecodeError(f"{self.position}: {self.why}")


class ClaimCheckedLog:
    """The `Log` protocol over another log and a store."""

    def __init__(self, log: Log, store: BlobStore, limit_bytes: int = LIMIT_BYTES) -> None:
        self._log = log
        self._claims = _Claims(store, limit_bytes)

    async def start(self) -> None:
        await self._log.start()

    async def close(self) -> None:
        await self._log.close()

    async def apply_topics(self, topics: Iterable[Topic]) -> list[str]:
        return await self._log.apply_topics(topics)

    async def publish(self, *records: Record, deadline_s: float = 30.0) -> None:
        await self.append(*[seal(record) for record in records], deadline_s=deadline_s)

    async def append(self, *messages: Message, deadline_s: float = 30.0) -> None:
        for message in messages:
            check(message)
        await self._log.append(*await self._claims.leave(messages), deadline_s=deadline_s)

    def follow(
        self,
        topics: Sequence[str],
        *,
        start: Start = "earliest",
        partitions: Sequence[int] | None = None,
        poll_s: float = 0.2,
    ) -> Follower:
        inner = self._log.follow(topics, start=start, partitions=partitions, poll_s=poll_s)
        assert isinstance(inner, BaseFollower)
        return _ClaimFollower(inner, self._claims, poll_s)

    async def end_offsets(self, topic: str) -> dict[int, int]:
        return await self._log.end_offsets(topic)

    async def high_watermarks(self, topic: str) -> dict[int, int]:
        return await self._log.high_watermarks(topic)

    async def beginning_offsets(self, topic: str) -> dict[int, int]:
        return await self._log.beginning_offsets(topic)

    async def committed(self, group: str) -> dict[TopicPartition, int]:
        return await self._log.committed(group)

    async def commits(self, group: str) -> dict[TopicPartition, Committed]:
        return await self._log.commits(group)

    async def topics(self) -> dict[str, int]:
        return await self._log.topics()

    async def groups(self) -> list[Group]:
        return await self._log.groups()

    async def join(
        self, topics: Sequence[str], *, group: str, member: str, on_revoked: OnRevoked, together: bool = False
    ) -> Member:
        joined = await self._log.join(topics, group=group, member=member, on_revoked=on_revoked, together=together)
        return _ClaimMember(joined, self._claims)

    async def writer(self, writer_id: str, *, group: str) -> Writer:
        return _ClaimWriter(await self._log.writer(writer_id, group=group), self._claims)


class _Claims:
    """Values into the store and back."""

    def __init__(self, store: BlobStore, limit_bytes: int) -> None:
        self._store = store
        self._limit = limit_bytes

    async def leave(self, messages: Sequence[Message]) -> list[Message]:
        """The messages with large values left in the store. BlobUnavailable: nothing may be written then."""
        large = [message.value for message in messages if len(message.value) > self._limit]
        if not large:
            return list(messages)
        refs = iter(await self._store.put_all(large))
        return [_left(m, next(refs)) if len(m.value) > self._limit else m for m in messages]

    async def fetch(self, messages: Sequence[Delivered]) -> list[Delivered]:
        """The messages with their values. BlobUnavailable: the store is away, all is to be asked for again."""
        found = {at: _claimed(message) for at, message in enumerate(messages) if BLOB in message.headers}
        refs = {at: ref for at, ref in found.items() if isinstance(ref, BlobRef)}
        wrong = {at: error for at, error in found.items() if isinstance(error, BlobError)}
        values = wrong | dict(zip(refs, await self._store.get_all(list(refs.values())), strict=True))
        return [_fetched(m, values[at]) if at in values else m for at, m in enumerate(messages)]


def _left(message: Message, ref: BlobRef) -> Message:
    """The message without its value, which is in the store."""
    headers = {**message.headers, BLOB: str(ref).encode()}
    if inner := references(message.value):
        headers[BLOBS] = " ".join(sorted(map(str, inner))).encode()
    return replace(message, value=b"", headers=headers)


def _fetched(delivered: Delivered, value: bytes | BlobError) -> Delivered:
    if isinstance(value, BlobError):
        found = (delivered.position, delivered.key, delivered.value, delivered.headers, delivered.timestamp_ms)
        return Unresolved(*found, why=str(value))
    headers = {name: text for name, text in delivered.headers.items() if name not in (BLOB, BLOBS)}
    return replace(delivered, value=value, headers=headers)


def _claimed(delivered: Delivered) -> BlobRef | BlobError:
    """BlobError for a header that is no reference, or one to more than the topic takes."""
    try:
        ref = BlobRef.parse(delivered.headers[BLOB])
    except BlobError as error:
        return error
    most = largest(topic_named(delivered.position.topic))
    return ref if ref.size <= most else BlobError(f"{ref} has {ref.size} bytes, the topic takes {most}")


class _Queue:
    """Messages that were read and are not handed out yet, because their values are still in the store."""

    def __init__(self, claims: _Claims) -> None:
        self.waiting: list[Delivered] = []
        self.paused: set[TopicPartition] = set()
        """Partitions whose messages stay here."""
        self._claims = claims

    def ready(self) -> Iterator[Delivered]:
        return (delivered for delivered in self.waiting if delivered.position.topic_partition not in self.paused)

    async def take(self, limit: int) -> list[Delivered]:
        """The next ones with their values. BlobUnavailable, and a cancellation, leave all of them waiting."""
        some = self._some(limit)
        if any(BLOB in delivered.headers for delivered in some):
            taken = await self._claims.fetch(some)
        else:
            taken = some
        gone = {delivered.position for delivered in some}
        self.waiting = [delivered for delivered in self.waiting if delivered.position not in gone]
        return taken

    def _some(self, limit: int) -> list[Delivered]:
        some: list[Delivered] = []
        size = 0
        for delivered in self.ready():
            size += _size(delivered)
            if some and (len(some) == limit or size > RESOLVE_BYTES):
                break
            some.append(delivered)
        return some

    def forget(self, partition: TopicPartition) -> None:
        self.waiting = [delivered for delivered in self.waiting if delivered.position.topic_partition != partition]

    def oldest(self) -> dict[TopicPartition, int]:
        """The first waiting offset of each partition that has one."""
        return {d.position.topic_partition: d.position.offset for d in reversed(self.waiting)}


def _size(delivered: Delivered) -> int:
    """Bytes with the value; a header that is no reference has no value behind it."""
    claimed = sum(ref.size for ref in references(delivered.headers.get(BLOB, b"")))
    return len(delivered.value) + claimed


class _ClaimFollower(BaseFollower):
    """The `Follower` protocol over another follower. While the store is away it gives nothing, and says so."""

    def __init__(self, inner: BaseFollower, claims: _Claims, poll_s: float) -> None:
        super().__init__(poll_s)
        self._inner = inner
        self._queue = _Queue(claims)

    async def open(self) -> None:
        await self._inner.open()

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def _fetch(self, timeout_s: float) -> list[Delivered]:
        if not self._queue.waiting:
            self._queue.waiting += await self._inner.poll(timeout_s)
        try:
            return await self._queue.take(len(self._queue.waiting))
        except BlobUnavailable as error:
            logger.warning("waiting for the blob store: %s", error)
            await anyio.sleep(min(timeout_s, RETRY_S))
            return []

    async def _ends(self) -> dict[TopicPartition, int]:
        return await self._inner._ends()

    async def _reached(self, ends: dict[TopicPartition, int]) -> bool:
        oldest = self._queue.oldest()
        return all(oldest.get(place, end) >= end for place, end in ends.items()) and await self._inner._reached(ends)

    def _fetched(self) -> dict[TopicPartition, int]:
        return {**self._inner.position(), **self._queue.oldest()}


class _ClaimMember:
    """The `Member` protocol over another member. While the store is away a poll says so, and loses nothing."""

    def __init__(self, inner: Member, claims: _Claims) -> None:
        self._inner = inner
        self._claims = claims
        self._queue = _Queue(claims)
        self._read_in = inner.epoch
        """The epoch in which the waiting messages were read: once partitions move they are read again."""

    @property
    def epoch(self) -> int:
        return self._inner.epoch

    @property
    def assigned(self) -> frozenset[TopicPartition] | None:
        return self._inner.assigned

    async def poll(self, *, limit: int, timeout_s: float) -> list[Delivered]:
        """BlobUnavailable: the stage waits as for a broker; the messages come with a later poll."""
        if self._read_in != self.epoch:
            self._queue = _Queue(self._claims)
        if not any(self._queue.ready()):
            self._read_in = self.epoch
            self._queue.waiting += await self._inner.poll(limit=limit, timeout_s=timeout_s)
        try:
            taken = await self._queue.take(limit)
        except BlobUnavailable:
            await self._inner.keep_alive()
            raise
        return taken if self._read_in == self.epoch else []

    async def keep_alive(self) -> None:
        await self._inner.keep_alive()

    def seek(self, partition: TopicPartition, offset: int) -> None:
        self._queue.forget(partition)
        self._inner.seek(partition, offset)

    def pause(self, partition: TopicPartition) -> None:
        self._queue.paused.add(partition)
        self._inner.pause(partition)

    def resume(self, partition: TopicPartition) -> None:
        self._queue.paused.discard(partition)
        self._inner.resume(partition)

    async def position(self, partition: TopicPartition) -> int | None:
        found = await self._inner.position(partition)
        return found if found is None else self._queue.oldest().get(partition, found)

    async def commit(self, commits: Mapping[TopicPartition, Committed]) -> None:
        await self._inner.commit(commits)

    async def leave(self) -> None:
        await self._inner.leave()


class _ClaimWriter:
    """The `Writer` protocol over another writer: blobs first, then the transaction."""

    def __init__(self, inner: Writer, claims: _Claims) -> None:
        self._inner = inner
        self._claims = claims

    async def commit(self, messages: Sequence[Message], commits: Mapping[TopicPartition, Committed]) -> None:
        await self._inner.commit(await self._claims.leave(messages), commits)

    async def close(self) -> None:
        await self._inner.close()
