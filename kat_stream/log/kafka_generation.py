"""KIP-447 for aiokafka: a transaction's offsets carry the group generation under which their messages were fetched.

aiokafka sends TxnOffsetCommit v0, without generation: a member that lost its partition commits all the same, writes its
output twice and moves the group's place back (research/kafka_real.md 3.5). Here TxnOffsetCommit v3 is sent instead, and
OffsetFetch v7 reads places that no open transaction is about to change.
Invariant: offsets of a transaction are accepted only from the member and generation that polled the messages; one that
lost its partition meanwhile gets CommitFailedError, can abort, and has changed nothing. Needs Kafka 2.5 or later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

from aiokafka import AIOKafkaProducer
from aiokafka.client import CoordinationType
from aiokafka.errors import CommitFailedError, GroupAuthorizationFailedError
from aiokafka.producer.sender import TxnOffsetCommitHandler
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.types import (
    Boolean,
    CompactArray,
    CompactString,
    Int16,
    Int32,
    Int64,
    Schema,
    TaggedFields,
)

UNSTABLE = 88
"""OffsetFetch: a transaction that will move this place is still open."""
_FENCED = (22, 25, 82)
"""ILLEGAL_GENERATION, UNKNOWN_MEMBER_ID, FENCED_INSTANCE_ID."""


class Holder(NamedTuple):
    """Who holds partitions: what a broker compares with the group's state."""

    generation: int = -1
    member_id: str = ""
    instance_id: str | None = None


NOBODY = Holder()
"""No member: the broker does not check (a writer outside of any group)."""
_TEXT, _TAGS = CompactString("utf-8"), ("tags", TaggedFields)


class _TxnOffsetCommitReply(Response):  # type: ignore[misc]
    API_KEY = 28
    API_VERSION = 3
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "topics",
            CompactArray(
                ("topic", _TEXT),
                ("partitions", CompactArray(("partition", Int32), ("error_code", Int16), _TAGS)),
                _TAGS,
            ),
        ),
        _TAGS,
    )


class _TxnOffsetCommitV3(RequestStruct):  # type: ignore[misc]
    FLEXIBLE_VERSION = True
    API_KEY = 28
    API_VERSION = 3
    RESPONSE_TYPE = _TxnOffsetCommitReply
    SCHEMA = Schema(
        ("transactional_id", _TEXT),
        ("group_id", _TEXT),
        ("producer_id", Int64),
        ("producer_epoch", Int16),
        ("generation_id", Int32),
        ("member_id", _TEXT),
        ("group_instance_id", _TEXT),
        (
            "topics",
            CompactArray(
                ("topic", _TEXT),
                (
                    "partitions",
                    CompactArray(
                        ("partition", Int32), ("offset", Int64), ("leader_epoch", Int32), ("metadata", _TEXT), _TAGS
                    ),
                ),
                _TAGS,
            ),
        ),
        _TAGS,
    )


class _TxnOffsetCommit(Request[_TxnOffsetCommitV3]):  # type: ignore[misc]
    API_KEY = 28

    def __init__(self, *fields: Any) -> None:
        self._fields = fields

    def build(self, request_struct_class: type[_TxnOffsetCommitV3]) -> _TxnOffsetCommitV3:
        return request_struct_class(*self._fields, {})


class _Handler(TxnOffsetCommitHandler):  # type: ignore[misc]
    """aiokafka's handler with another request on the wire and the errors that come with a generation."""

    def __init__(self, sender: Any, offsets: Any, group_id: str, holder: Holder) -> None:
        super().__init__(sender, offsets, group_id)
        self._holder = holder

    def create_request(self) -> _TxnOffsetCommit:
        manager = self._sender._txn_manager
        topics: dict[str, list[tuple[int, int, int, str, dict[int, bytes]]]] = {}
        for place, offset in sorted(self._offsets.items()):
            topics.setdefault(place.topic, []).append((place.partition, offset.offset, -1, offset.metadata, {}))
        return _TxnOffsetCommit(
            manager.transactional_id,
            self._group_id,
            manager.producer_id,
            manager.producer_epoch,
            *self._holder,
            [(topic, partitions, {}) for topic, partitions in topics.items()],
        )

    def handle_response(self, reply: Any) -> float | None:
        errors = [(topic, [(number, code) for number, code, _ in numbers]) for topic, numbers, _ in reply.topics]
        if any(code in _FENCED for _, numbers in errors for _, code in numbers):
            why = f"generation {self._holder.generation} of {self._group_id} does not hold these partitions any more"
            manager = self._sender._txn_manager
            manager.error_transaction(CommitFailedError(why))
            manager.wait_for_transaction_end().exception()  # seen: whoever sent the offsets is told by its own future
            return None
        backoff: float | None = super().handle_response(SimpleNamespace(errors=errors))
        return backoff


def bind(producer: AIOKafkaProducer, holder: Callable[[], Holder]) -> None:
    """Offsets of this producer's transactions are committed as `holder()`, asked once a request."""
    sender = producer._sender

    async def commit_offsets(offsets: Any, group_id: str) -> None:
        if not offsets:
            return
        try:
            node = await sender._find_coordinator(CoordinationType.GROUP, group_id)
        except GroupAuthorizationFailedError as error:
            sender._txn_manager.error_transaction(error)
            return
        await _Handler(sender, offsets, group_id, holder()).do(node)

    sender._do_txn_offset_commit = commit_offsets


class _OffsetFetchReply(Response):  # type: ignore[misc]
    API_KEY = 9
    API_VERSION = 7
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "topics",
            CompactArray(
                ("topic", _TEXT),
                (
                    "partitions",
                    CompactArray(
                        ("partition", Int32),
                        ("offset", Int64),
                        ("leader_epoch", Int32),
                        ("metadata", _TEXT),
                        ("error_code", Int16),
                        _TAGS,
                    ),
                ),
                _TAGS,
            ),
        ),
        ("error_code", Int16),
        _TAGS,
    )


class _OffsetFetchV7(RequestStruct):  # type: ignore[misc]
    FLEXIBLE_VERSION = True
    API_KEY = 9
    API_VERSION = 7
    RESPONSE_TYPE = _OffsetFetchReply
    SCHEMA = Schema(
        ("group_id", _TEXT),
        ("topics", CompactArray(("topic", _TEXT), ("partitions", CompactArray(Int32)), _TAGS)),
        ("require_stable", Boolean),
        _TAGS,
    )


class StableOffsetFetch(Request[_OffsetFetchV7]):  # type: ignore[misc]
    """Places of a group; one that an open transaction may move comes with the error UNSTABLE.

    `partitions` by topic: asked for all, the broker leaves out what has a pending place and no other.
    """

    API_KEY = 9

    def __init__(self, group_id: str, partitions: Mapping[str, Iterable[int]]) -> None:
        self._group_id = group_id
        self._topics: list[tuple[str, list[int], dict[int, bytes]]] = [
            (topic, list(numbers), {}) for topic, numbers in partitions.items()
        ]

    def build(self, request_struct_class: type[_OffsetFetchV7]) -> _OffsetFetchV7:
        return request_struct_class(self._group_id, self._topics, True, {})
