"""The table of delay tiers agrees with the catalogue and with its own names."""

from __future__ import annotations

from kat_stream.log.retries import TIERS
from topics import Deferred
from topics.catalogue import topic_named


def test_tiers_are_topics_with_the_partitions_of_groups_and_wait_as_long_as_they_say() -> None:
    for name, seconds in TIERS.items():
        assert name == f"retries.{seconds:g}s"
        assert topic_named(name).record is Deferred
        assert topic_named(name).partitions == topic_named("rewards").partitions
