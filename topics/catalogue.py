"""The catalogue of topics, as code: name, record, key, partitions, cleanup. `kat-stream topics apply` makes it real.

Invariant: group topics and the ledger have one partition count and the partition is computed from `group_id`
whatever the key is, so that one consumer joins a whole group without a shuffle. That count is chosen once, before the
first record (`log.partitions`); whoever places records takes it from the topic itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal
from zlib import crc32

from topics.batch import PackedBatch
from topics.dead_letter import DeadLetter
from topics.deferred import Deferred
from topics.group_closed import GroupClosed
from topics.ledger import LedgerEntry
from topics.policy_version import PolicyVersion
from topics.record import Record
from topics.request import RolloutRequest
from topics.reward import Reward
from topics.score import Score
from topics.task import Task
from topics.train_step import TrainStep
from topics.trajectory import Trajectory
from topics.turn import Turn

GROUP_PARTITIONS = 12
"""Unless the configuration says otherwise: at most so many workers share a topic."""
MIB = 1 << 20
FOREVER = -1
"""No message goes because it is old: `kat-stream topics trim` removes what is archived and needed by nobody."""


@dataclass(frozen=True, slots=True)
class Topic:
    name: str
    record: type[Record]
    key: str | None
    """Field or property of the record that is the message key."""
    partition_by: str | None
    """Field that chooses the partition; None: partition 0."""
    cleanup: Literal["compact", "delete"]
    about: str
    partitions: int = GROUP_PARTITIONS
    retention_ms: int = FOREVER
    """By time; a broker that removes by the clock does not know what an archive or a checkpoint still needs."""
    max_message_bytes: int = 16 * MIB


CATALOGUE: tuple[Topic, ...] = (
    Topic("tasks", Task, "task_id", None, "compact", "problems that may be set", partitions=1),
    Topic("rollout.requests", RolloutRequest, "group_id", "group_id", "delete", "attempts asked for"),
    Topic("turns", Turn, "group_id", "group_id", "delete", "model calls, each before its reply ends"),
    Topic("trajectories", Trajectory, "group_id", "group_id", "delete", "finished rollouts: trees of turns"),
    Topic("rewards", Reward, "group_id", "group_id", "delete", "gradings"),
    Topic("scores", Score, "group_id", "group_id", "delete", "teacher or repeated log-probs"),
    Topic("batches", PackedBatch, "group_id", "group_id", "delete", "groups, tree-packed for the learner"),
    Topic("policy.versions", PolicyVersion, "branch", None, "compact", "weights that may be sampled", partitions=1),
    Topic("train.steps", TrainStep, "run", None, "delete", "optimizer steps and their manifests", partitions=1),
    Topic("ledger", LedgerEntry, "rollout_id", "group_id", "compact", "newest fate of each rollout"),
    Topic("groups.closed", GroupClosed, "group_id", "group_id", "compact", "groups that have a batch"),
    Topic("retries.10s", Deferred, None, None, "delete", "tried again after 10 s, in the partition it came from"),
    Topic("retries.60s", Deferred, None, None, "delete", "tried again after a minute"),
    Topic("retries.600s", Deferred, None, None, "delete", "tried again after ten minutes"),
    Topic("dead.letters", DeadLetter, None, None, "delete", "what could not be read", partitions=1),
)
_BY_NAME = {topic.name: topic for topic in CATALOGUE}
_BY_RECORD = {topic.record: topic for topic in CATALOGUE}


def topic_named(name: str) -> Topic:
    return _BY_NAME[name]


def topic_of(record: Record | type[Record]) -> Topic:
    return _BY_RECORD[record if isinstance(record, type) else type(record)]


def key_of(record: Record) -> bytes | None:
    field = topic_of(record).key
    return None if field is None else str(getattr(record, field)).encode()


def catalogue(partitions: int = GROUP_PARTITIONS) -> tuple[Topic, ...]:
    """The topics, with so many partitions wherever a record's group decides, and of the tiers where it waits."""
    return tuple(topic if topic.partitions == 1 else replace(topic, partitions=partitions) for topic in CATALOGUE)


def spread_of(record: Record) -> int:
    """A hash of its `group_id`, 0 for topics with one partition: modulo the topic's partitions it is the record's."""
    topic = topic_of(record)
    return 0 if topic.partition_by is None else crc32(getattr(record, topic.partition_by).encode())


def partition_of(record: Record, partitions: int = GROUP_PARTITIONS) -> int:
    """The partition of a record on a topic that has so many."""
    return spread_of(record) % partitions
