"""What a group member has fetched and not handed out yet: the oldest message first, over all partitions.

Invariant: each partition's messages leave in order, a paused partition gives none, and a partition that is sought or
taken away leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Iterable
from heapq import merge
from itertools import islice

from kat_stream.log.base import Delivered, TopicPartition


class FairBuffer:
    """Messages by partition. aiokafka hands out one partition to its end before the next one: here none waits so."""

    def __init__(self) -> None:
        self._waiting: dict[TopicPartition, list[Delivered]] = {}
        self._paused: set[TopicPartition] = set()

    @property
    def ready(self) -> bool:
        """Whether there is something to hand out."""
        return any(partition not in self._paused for partition in self._waiting)

    def wants(self, partition: TopicPartition) -> bool:
        """Whether the partition's next messages should be fetched."""
        return partition not in self._waiting and partition not in self._paused

    def put(self, partition: TopicPartition, messages: Iterable[Delivered]) -> None:
        """Add what was fetched; `wants` said so."""
        self._waiting[partition] = list(messages)

    def take(self, limit: int) -> list[Delivered]:
        """At most `limit` messages by age."""
        lines = [messages for partition, messages in self._waiting.items() if partition not in self._paused]
        taken = list(islice(merge(*lines, key=lambda message: message.timestamp_ms), limit))
        counts: dict[TopicPartition, int] = {}
        for message in taken:
            place = message.position.topic_partition
            counts[place] = counts.get(place, 0) + 1
        for place, count in counts.items():
            self._keep(place, self._waiting[place][count:])
        return taken

    def position(self, partition: TopicPartition) -> int | None:
        """The next offset that is handed out; None if nothing waits."""
        messages = self._waiting.get(partition)
        return messages[0].position.offset if messages else None

    def drop(self, partition: TopicPartition) -> None:
        self._waiting.pop(partition, None)

    def clear(self) -> None:
        """Partitions move: nothing is waiting or paused."""
        self._waiting.clear()
        self._paused.clear()

    def pause(self, partition: TopicPartition) -> None:
        self._paused.add(partition)

    def resume(self, partition: TopicPartition) -> None:
        self._paused.discard(partition)

    def _keep(self, partition: TopicPartition, messages: list[Delivered]) -> None:
        if messages:
            self._waiting[partition] = messages
        else:
            del self._waiting[partition]
