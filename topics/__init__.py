"""The contract between the services: what flows, in pipeline order.

    tasks -> rollout.requests -> turns, trajectories -> rewards (and scores) -> batches -> train.steps
                                                                               policy.versions runs backwards
    ledger: the fate of every requested rollout.   groups.closed: which groups have a batch.
    dead.letters: what could not be read.

One record type a file; this package needs only the standard library and msgspec, and does no I/O.
Records are frozen, grow only by appended fields with defaults, and travel as msgpack maps tagged `Name/version`.
"""

from topics.batch import GroupMember, PackedBatch, PackedRow
from topics.catalogue import CATALOGUE, Topic, catalogue, partition_of, topic_named, topic_of
from topics.dead_letter import DeadLetter
from topics.deferred import Deferred
from topics.group_closed import GroupClosed
from topics.ledger import LedgerEntry
from topics.policy_version import PolicyVersion, format_version, parse_version
from topics.record import Record, decode, decode_any, encode, header_of
from topics.request import RolloutRequest, Sampling
from topics.reward import Reward
from topics.score import Score
from topics.task import Environment, Task, VerifierSpec
from topics.train_step import TrainStep
from topics.trajectory import OUTCOMES, Trajectory
from topics.turn import Turn, VersionSpan

__all__ = [
    "CATALOGUE",
    "OUTCOMES",
    "DeadLetter",
    "Deferred",
    "Environment",
    "GroupClosed",
    "GroupMember",
    "LedgerEntry",
    "PackedBatch",
    "PackedRow",
    "PolicyVersion",
    "Record",
    "Reward",
    "RolloutRequest",
    "Sampling",
    "Score",
    "Task",
    "Topic",
    "TrainStep",
    "Trajectory",
    "Turn",
    "VerifierSpec",
    "VersionSpan",
    "catalogue",
    "decode",
    "decode_any",
    "encode",
    "format_version",
    "header_of",
    "parse_version",
    "partition_of",
    "topic_named",
    "topic_of",
]
