"""Who may do what on the broker: the rights that each service needs, as one table.

Derived from it: `kat-stream topics acl` and ops/acl/kat-stream.json; a test holds each service file's In and Out lines
against it. Invariant: a service with exactly these rights works; it reads no topic and writes none besides these.
Groups and transactional ids begin with a run's name, which is not known here: they are granted by prefix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from kat_stream.errors import ConfigError
from topics.catalogue import CATALOGUE

ALL = tuple(topic.name for topic in CATALOGUE)
TIERS = tuple(name for name in ALL if name.startswith("retries."))
Resource = Literal["topic", "group", "transactional-id"]


@dataclass(frozen=True, slots=True)
class Access:
    """What one service does on the log."""

    reads: tuple[str, ...] = ()
    """Topics of its own logic: the In line of its file."""
    writes: tuple[str, ...] = ()
    """Likewise, the Out line."""
    works: bool = False
    """Runs the stage loop `work`: it also reads and writes the delay tiers, and dead letters."""
    group: bool = False
    """Is a member of a consumer group."""
    transactional: bool = False
    dead_letters: bool = False
    """Puts what it cannot read into dead.letters."""
    administers: bool = False
    """Creates topics and sets their configuration."""
    watches: bool = False
    """Asks where the groups of others stand."""


SERVICES: dict[str, Access] = {
    "sampler": Access(
        reads=("policy.versions", "rollout.requests", "rewards", "ledger"),
        writes=("tasks", "rollout.requests"),
        transactional=True,
    ),
    "gateway": Access(reads=("turns",), writes=("turns",)),
    "engine": Access(reads=("policy.versions",)),
    "rollout": Access(
        reads=("rollout.requests",), writes=("trajectories", "rewards", "ledger"), works=True, group=True
    ),
    "verifier": Access(reads=("trajectories",), writes=("rewards",), works=True, group=True),
    "scorer": Access(reads=("trajectories",), writes=("scores",), works=True, group=True),
    "packer": Access(
        reads=("trajectories", "rewards", "scores", "policy.versions", "groups.closed"),
        writes=("batches", "ledger", "groups.closed"),
        group=True,
        transactional=True,
        dead_letters=True,
    ),
    "trainer": Access(
        reads=("batches", "policy.versions", "rollout.requests", "rewards", "ledger", "train.steps"),
        writes=("policy.versions", "train.steps", "ledger"),
        transactional=True,
        dead_letters=True,
    ),
    "weight_sync": Access(reads=("policy.versions",)),
    "archiver": Access(reads=ALL),
    "run": Access(reads=ALL, writes=("ledger",), administers=True, watches=True),
    "viewer": Access(reads=ALL, watches=True),
}
"""`run` is `kat-stream run` itself and `topics apply`; `viewer` is tail, trace, ledger, lag, topics diff."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of an access list: a user may do an operation on a resource."""

    principal: str
    operation: str
    """Kafka's name: Read, Write, Describe, Create, DescribeConfigs, AlterConfigs."""
    resource: Resource
    name: str
    prefixed: bool = False
    """Whether the name is the beginning of the resources' names."""

    def command(self) -> str:
        """The arguments of Kafka's kafka-acls that grant it."""
        pattern = " --resource-pattern-type prefixed" if self.prefixed else ""
        who = f"--allow-principal {self.principal} --operation {self.operation}"
        return f"--add {who} --{self.resource} {self.name}{pattern}"


def rules_of(service: str, prefix: str) -> list[Rule]:
    """The access list of a service, whose user is `User:kat-SERVICE`. ConfigError for an unknown one."""
    if service not in SERVICES:
        raise ConfigError(f"no service `{service}` in the access lists; there are: {', '.join(SERVICES)}")
    principal = f"User:kat-{service}"
    return [Rule(principal, *rest) for rest in _rules(SERVICES[service], prefix)]


def _rules(access: Access, prefix: str) -> Iterator[tuple[str, Resource, str, bool]]:
    """Read and Write imply Describe; Write on any topic implies what an idempotent producer needs."""
    tiers = TIERS if access.works else ()
    dead = ("dead.letters",) if access.works or access.dead_letters else ()
    for topic in dict.fromkeys((*access.reads, *tiers)):
        yield "Read", "topic", prefix + topic, False
    for topic in dict.fromkeys((*access.writes, *tiers, *dead)):
        yield "Write", "topic", prefix + topic, False
    if access.administers:
        yield "Create", "topic", prefix, True
        yield "AlterConfigs", "topic", prefix, True
    if access.administers or access.watches:
        yield "DescribeConfigs", "topic", prefix, True
    if access.group:
        yield "Read", "group", prefix, True
    if access.watches:
        yield "Describe", "group", prefix, True
    if access.transactional:
        yield "Write", "transactional-id", prefix, True
