"""The assignor of our groups: sticky, also where equal partition numbers of several topics belong together.

aiokafka's sticky assignor keeps its state in the class and knows no joins; its range assignor knows joins and moves
nearly everything when a member comes or goes. Invariant: the assignment is `assignment.assign` over the same units as
in the in-memory log; what two members claim belongs to the later generation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import msgspec
from aiokafka.cluster import ClusterMetadata
from aiokafka.coordinator.assignors.abstract import AbstractPartitionAssignor
from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment, ConsumerProtocolMemberMetadata

from kat_stream.log.assignment import assign

Unit = tuple[tuple[str, int], ...]
"""What is assigned as one: a partition, or a partition number of all topics."""


class Claim(msgspec.Struct, frozen=True, array_like=True):
    """What a member had, sent with each join."""

    generation: int = -1
    partitions: frozenset[tuple[str, int]] = frozenset()


class Assignor(AbstractPartitionAssignor):  # type: ignore[misc]
    """Base of the class that each consumer makes for itself with `assignor`: aiokafka wants classes, not objects."""

    name = "kat"
    together: ClassVar[bool]
    claim: ClassVar[Claim]

    @classmethod
    def metadata(cls, topics: Iterable[str]) -> ConsumerProtocolMemberMetadata:
        return ConsumerProtocolMemberMetadata(0, sorted(topics), msgspec.msgpack.encode(cls.claim))

    @classmethod
    def on_assignment(cls, assignment: ConsumerProtocolMemberAssignment) -> None:
        """The member sets `claim` itself: only it knows the generation."""

    @classmethod
    def assign(
        cls, cluster: ClusterMetadata, members: Mapping[str, ConsumerProtocolMemberMetadata]
    ) -> dict[str, ConsumerProtocolMemberAssignment]:
        topics = {topic for metadata in members.values() for topic in metadata.subscription}
        partitions = [(topic, number) for topic in topics for number in cluster.partitions_for_topic(topic) or ()]
        units = _units(partitions, cls.together)
        mine = assign(units, _owned(units, {name: _claim(members[name]) for name in sorted(members)}))
        return {name: _assignment(mine[name]) for name in members}


def assignor(together: bool) -> type[Assignor]:
    """A class of its own for one consumer."""
    state: dict[str, Any] = {"together": together, "claim": Claim(), "name": "kat-together" if together else "kat"}
    return type("Assignor", (Assignor,), state)


def _units(partitions: Iterable[tuple[str, int]], together: bool) -> list[Unit]:
    if not together:
        return [(partition,) for partition in partitions]
    numbers: dict[int, list[tuple[str, int]]] = {}
    for partition in partitions:
        numbers.setdefault(partition[1], []).append(partition)
    return [tuple(sorted(found)) for found in numbers.values()]


def _owned(units: Iterable[Unit], claims: Mapping[str, Claim]) -> dict[str, list[Unit]]:
    free = set(units)
    owned: dict[str, list[Unit]] = {name: [] for name in claims}
    for name, claim in sorted(claims.items(), key=lambda item: -item[1].generation):
        owned[name] = sorted(unit for unit in free if claim.partitions.issuperset(unit))
        free.difference_update(owned[name])
    return owned


def _claim(metadata: ConsumerProtocolMemberMetadata) -> Claim:
    return msgspec.msgpack.decode(metadata.user_data, type=Claim) if metadata.user_data else Claim()


def _assignment(units: Iterable[Unit]) -> ConsumerProtocolMemberAssignment:
    topics: dict[str, list[int]] = {}
    for topic, number in sorted(partition for unit in units for partition in unit):
        topics.setdefault(topic, []).append(number)
    return ConsumerProtocolMemberAssignment(0, list(topics.items()), b"")
