"""`topics diff | apply` on a real broker: what differs is found and set; what would tear groups apart is refused."""

from __future__ import annotations

import logging
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from kat_stream.cli import main
from kat_stream.errors import LogError
from kat_stream.log import broker
from kat_stream.log.kafka import KafkaLog
from kat_stream.log.kafka_topics import Difference
from tests.waiting import until
from topics.catalogue import CATALOGUE, topic_named

pytestmark = [pytest.mark.kafka, pytest.mark.anyio]
TOPICS = [topic_named("rewards"), topic_named("ledger")]


@pytest.fixture
async def log(kafka_bootstrap: str) -> AsyncIterator[KafkaLog]:
    log = KafkaLog(kafka_bootstrap, prefix=f"t{uuid.uuid4().hex[:8]}.")
    await log.start()
    yield log
    await log.close()


async def test_what_is_missing_is_made_and_then_nothing_differs(log: KafkaLog) -> None:
    assert [str(one) for one in await log.compare_topics(TOPICS)] == ["- rewards: missing", "- ledger: missing"]
    await log.apply_topics(TOPICS)
    assert await log.compare_topics(TOPICS) == []


async def test_settings_are_set_one_by_one_and_others_stay(log: KafkaLog) -> None:
    await log.apply_topics(TOPICS)
    rewards = replace(TOPICS[0], retention_ms=3_600_000, max_message_bytes=1 << 20)
    await log.align_topics([Difference("rewards", "segment.bytes", wanted="33554432")])  # an operator's own
    found = await log.compare_topics([rewards, TOPICS[1]])
    assert {one.what for one in found} == {"retention.ms", "max.message.bytes"}
    said = f"~ rewards: retention.ms {TOPICS[0].retention_ms}, the catalogue says 3600000"
    assert said in map(str, found)
    await log.align_topics(found)
    assert await log.compare_topics([rewards, TOPICS[1]]) == []
    kept = replace(rewards, cleanup="compact")
    (policy,) = [one for one in await log.compare_topics([kept]) if one.what == "cleanup.policy"]
    assert (policy.there, policy.wanted, policy.mendable) == ("delete", "compact", True)
    settings = await log._admin._admin.describe_configs([_resource(log, "rewards")])
    assert {entry[0]: entry[1] for entry in settings[0].resources[0][4]}["segment.bytes"] == "33554432"


def _resource(log: KafkaLog, topic: str) -> object:
    from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

    return ConfigResource(ConfigResourceType.TOPIC, log._broker.named(topic))


async def test_another_partition_count_is_refused_with_the_reason_and_nothing_is_changed(log: KafkaLog) -> None:
    await log.apply_topics(TOPICS)
    for count in (6, 24):
        wanted = [replace(TOPICS[0], partitions=count, retention_ms=1000), TOPICS[1]]
        differences = await log.compare_topics(wanted)
        assert [one.what for one in differences] == ["partitions", "retention.ms"]
        with pytest.raises(LogError, match=rf"rewards has 12 partitions, the catalogue says {count}\. .*torn apart"):
            await log.align_topics(differences)
    assert await log.compare_topics(TOPICS) == []


async def test_a_refused_value_is_an_error_that_names_the_topic(log: KafkaLog) -> None:
    await log.apply_topics(TOPICS)
    with pytest.raises(LogError, match=r"rewards.*retention\.ms"):
        await log.align_topics([Difference("rewards", "retention.ms", wanted="-7")])


async def test_unknown_topics_under_our_prefix_are_named_and_left_alone(log: KafkaLog) -> None:
    await log.apply_topics([*TOPICS, topic_named("scores")])
    differences = await log.compare_topics(TOPICS)
    assert list(map(str, differences)) == ["? scores: not in the catalogue; it is left alone"]
    await log.align_topics(differences)
    assert "scores" in await log.topics()


async def test_a_cluster_of_three_gets_three_copies_and_two_in_sync(kafka_cluster: broker.Cluster) -> None:
    log = KafkaLog(kafka_cluster.bootstrap, prefix=f"t{uuid.uuid4().hex[:8]}.")
    await log.start()
    try:
        await log.apply_topics(TOPICS)
        assert await log.compare_topics(TOPICS) == []
        described = await log._admin._admin.describe_topics([log._broker.named("rewards")])
        assert {len(one["replicas"]) for one in described[0]["partitions"]} == {3}
        reply = await log._admin._admin.describe_configs([_resource(log, "rewards")])
        assert {e[0]: e[1] for e in reply[0].resources[0][4]}["min.insync.replicas"] == "2"
    finally:
        await log.close()


async def test_topics_made_while_a_broker_is_away_are_said_to_have_fewer_copies(
    kafka_cluster: broker.Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    """As an error: those reach the terminal of a run, which makes topics at its start."""
    kafka_cluster.node(3).kill()
    log = KafkaLog(kafka_cluster.bootstrap, prefix=f"t{uuid.uuid4().hex[:8]}.")
    await log.start()
    try:
        await until(lambda: two_brokers(log), "the cluster to miss it")
        await log.apply_topics(TOPICS)
        (said,) = [one.getMessage() for one in caplog.records if one.levelno == logging.ERROR]
        assert said.startswith("2 topics get 2 copies, not 3")
        caplog.clear()
        await log.apply_topics(TOPICS)
        assert [one for one in caplog.records if one.levelno == logging.ERROR] == []
    finally:
        await log.close()


async def two_brokers(log: KafkaLog) -> bool:
    admin = log._admin
    return len((await admin._ask("brokers", admin._admin.describe_cluster))["brokers"]) == 2


def test_the_command(tmp_path: object, kafka_cluster: broker.Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    """On the cluster, whose default prefix no other test uses."""
    where = ["--log", f"kafka:{kafka_cluster.bootstrap}"]
    assert main(["topics", "diff", *where]) == 1
    assert "- turns: missing\n" in capsys.readouterr().out
    assert main(["topics", "apply", "--dry-run", *where]) == 0
    assert "would be created turns\n" in capsys.readouterr().out
    assert main(["topics", "apply", *where]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(CATALOGUE)
    assert main(["topics", "apply", *where]) == 0
    assert capsys.readouterr().out == "nothing to do: all topics are as in the catalogue\n"
    assert main(["topics", "diff", *where]) == 0
    assert capsys.readouterr().out == "no difference\n"
