"""Topics as code: how a broker's topics differ from the catalogue, and making them equal where that is safe.

Invariant: nothing here deletes a topic, moves a record or changes a partition count; settings that the catalogue does
not name stay as an operator set them (IncrementalAlterConfigs: the older AlterConfigs resets what it is not told,
research/kafka_real.md 9.2).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import for_code
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.types import Array, Boolean, Int8, Int16, Int32, Schema, String

from kat_stream.errors import LogError
from kat_stream.log.kafka_client import ASK_S, Broker
from kat_stream.log.message import OVERHEAD, largest
from topics.catalogue import Topic

REPLICAS = 3
"""Copies of a topic where there are as many brokers."""
TOPIC_RESOURCE, SET = 2, 0


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing in which a topic on the broker is not what the catalogue says."""

    topic: str
    what: str
    """`missing`, `unknown`, `partitions`, `replicas`, or the name of a topic setting."""
    there: str = ""
    wanted: str = ""

    @property
    def mendable(self) -> bool:
        """Whether `apply` puts it right."""
        return self.what not in ("unknown", "partitions", "replicas")

    def __str__(self) -> str:
        if self.what == "missing":
            return f"- {self.topic}: missing"
        if self.what == "unknown":
            return f"? {self.topic}: not in the catalogue; it is left alone"
        return (
            f"{'~' if self.mendable else '!'} {self.topic}: {self.what} {self.there}, the catalogue says {self.wanted}"
        )


def settings_of(topic: Topic, replicas: int) -> dict[str, str]:
    """The settings that the catalogue gives a topic with so many copies."""
    settings = {
        "cleanup.policy": topic.cleanup,
        "max.message.bytes": str(largest(topic) + OVERHEAD),
        "min.insync.replicas": "2" if replicas >= REPLICAS else "1",
    }
    if topic.cleanup == "delete":
        return {**settings, "retention.ms": str(topic.retention_ms)}
    return {**settings, "min.cleanable.dirty.ratio": "0.1"}


class KafkaTopics:
    """Compares and aligns; on the admin connection of its owner."""

    def __init__(self, broker: Broker, client: AIOKafkaAdminClient) -> None:
        self._broker = broker
        self._client = client

    async def compare(self, topics: Iterable[Topic]) -> list[Difference]:
        """Every difference, in the order of `topics`; unknown topics under our prefix last."""
        wanted = list(topics)
        with self._broker.translated("comparing topics", "DescribeConfigs"):
            async with asyncio.timeout(ASK_S):
                there = await self._copies()
                brokers = len((await self._client.describe_cluster())["brokers"])
                found = [topic for topic in wanted if topic.name in there]
                settings = await self._settings({topic.name: settings_of(topic, 1).keys() for topic in found})
        differences = []
        for topic in wanted:
            copies = there.get(topic.name)
            if copies is None:
                differences.append(Difference(topic.name, "missing"))
            else:
                differences += _compared(topic, copies, settings[topic.name], min(REPLICAS, brokers))
        unknown = sorted(there.keys() - {topic.name for topic in wanted})
        return differences + [Difference(name, "unknown") for name in unknown]

    async def align(self, differences: Sequence[Difference]) -> None:
        """Set the settings among `differences`. LogError: partition counts differ (nothing was changed then)."""
        refuse_repartition(differences)
        changes: dict[str, list[tuple[str, int, str]]] = {}
        for difference in differences:
            if difference.mendable and difference.what != "missing":
                changes.setdefault(difference.topic, []).append((difference.what, SET, difference.wanted))
        if changes:
            resources = [(TOPIC_RESOURCE, self._broker.named(topic), entries) for topic, entries in changes.items()]
            with self._broker.translated("changing topic settings", "AlterConfigs"):
                async with asyncio.timeout(ASK_S):
                    node = self._client._client.get_random_node()
                    reply = await self._client._client.send(node, _Incremental(resources))
                    for code, message, _, name in reply.responses:
                        if code:
                            raise for_code(code)(f"topic {name}: {message or ''}")

    async def _copies(self) -> dict[str, tuple[int, int]]:
        """Partitions and copies of each topic under our prefix."""
        prefix = self._broker.prefix
        return {
            one["topic"].removeprefix(prefix): (len(one["partitions"]), len(one["partitions"][0]["replicas"]))
            for one in await self._client.describe_topics()
            if one["topic"].startswith(prefix) and not one["is_internal"] and one["partitions"]
        }

    async def _settings(self, names: dict[str, Iterable[str]]) -> dict[str, dict[str, str]]:
        if not names:
            return {}
        resources = [
            ConfigResource(ConfigResourceType.TOPIC, self._broker.named(topic), configs=dict.fromkeys(keys))
            for topic, keys in names.items()
        ]
        found: dict[str, dict[str, str]] = {}
        for reply in await self._client.describe_configs(resources):
            for code, message, _, name, entries in reply.resources:
                if code:
                    raise for_code(code)(f"topic {name}: {message or ''}")
                found[name.removeprefix(self._broker.prefix)] = {entry[0]: entry[1] for entry in entries}
        return found


def repartitioned(wanted: Iterable[Topic], there: Mapping[str, int]) -> list[Difference]:
    """Topics that have another partition count than they should; `there` may lack some."""
    counts = [(topic.name, there.get(topic.name, topic.partitions), topic.partitions) for topic in wanted]
    return [Difference(name, "partitions", str(has), str(should)) for name, has, should in counts if has != should]


def refuse_repartition(differences: Iterable[Difference]) -> None:
    """LogError if a partition count differs: it says why it cannot be changed, and what to do."""
    wrong = [difference for difference in differences if difference.what == "partitions"]
    if wrong:
        names = "; ".join(f"{d.topic} has {d.there} partitions, the catalogue says {d.wanted}" for d in wrong)
        raise LogError(
            f"{names}. A record's partition is a hash of its group over this number: with another one, groups that are"
            " under way would be torn apart, and Kafka cannot take partitions away. Set log.partitions to what is"
            " there, or let the runs end, delete the topics and apply again"
        )


def _compared(topic: Topic, copies: tuple[int, int], settings: dict[str, str], replicas: int) -> list[Difference]:
    partitions, there = copies
    rows = [("partitions", str(partitions), str(topic.partitions))]
    if there < replicas:
        rows.append(("replicas", str(there), str(replicas)))
    rows += [(key, settings.get(key, "unset"), value) for key, value in settings_of(topic, there).items()]
    return [Difference(topic.name, what, is_, wanted) for what, is_, wanted in rows if is_ != wanted]


class _IncrementalReply(Response):  # type: ignore[misc]
    API_KEY, API_VERSION = 44, 0
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "responses",
            Array(("code", Int16), ("message", String("utf-8")), ("type", Int8), ("name", String("utf-8"))),
        ),
    )


class _Incremental0(RequestStruct):  # type: ignore[misc]
    API_KEY, API_VERSION, RESPONSE_TYPE = 44, 0, _IncrementalReply
    SCHEMA = Schema(
        (
            "resources",
            Array(
                ("type", Int8),
                ("name", String("utf-8")),
                ("configs", Array(("name", String("utf-8")), ("operation", Int8), ("value", String("utf-8")))),
            ),
        ),
        ("validate_only", Boolean),
    )


class _Incremental(Request[_Incremental0]):  # type: ignore[misc]
    """IncrementalAlterConfigs, which aiokafka 0.14 lacks."""

    API_KEY = 44

    def __init__(self, resources: list[tuple[int, str, list[tuple[str, int, str]]]]) -> None:
        self._resources = resources

    def build(self, request_struct_class: type[Any]) -> Any:
        return request_struct_class(self._resources, False)
