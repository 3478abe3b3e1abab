"""Packer: joins the trajectories, rewards and scores of a group and writes it as one tree-packed batch.

In:      trajectories, rewards, scores (if a scorer runs); policy.versions (to know what is stale)
Out:     batches, ledger (packed, filtered, stale, failed, cancelled, evaluated), groups.closed
Key:     group_id
Commits: the low-watermark of open groups, in the transaction that writes the batch
Fails:   a record that cannot be read is a dead letter; a turn that cannot be trained is a counted filter, and so is a
         group whose batch is larger than its topic allows (too_large); a group that lacks members long after its
         requests' deadline is closed as failed (incomplete)

A group is closed once: every group that was closed is known for as long as the run lasts (some 150 bytes a group, read
back from groups.closed after a restart), so a message that comes late closes nothing a second time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import anyio

from kat_stream import telemetry
from kat_stream.config import ScorerSection
from kat_stream.errors import DataError, DecodeError
from kat_stream.log.base import Delivered, Position
from kat_stream.log.message import seal
from kat_stream.log.outcome import Emit, Hold, Outcome
from kat_stream.log.transform import run_transform
from kat_stream.policy import max_positions
from kat_stream.rl.group import GroupRules, pack_group
from kat_stream.rl.incomplete import Listening, incomplete_batch
from kat_stream.rl.scores import ScoreRules
from kat_stream.rl.step import without_rows
from kat_stream.service import Context
from kat_stream.versions import Versions
from topics import GroupClosed, LedgerEntry, PackedBatch, Record, Reward, Score, Trajectory, partition_of
from topics.catalogue import GROUP_PARTITIONS
from topics.ledger import State

log = logging.getLogger(__name__)

VERSION_READY_S = 180.0
CLOSED = "groups.closed"
Life = tuple[str, str]
"""Of a rollout: rollout_id, and `life` as its trajectory, rewards and scores name it."""


class Packer:
    async def run(self, ctx: Context) -> None:
        versions = Versions(ctx.run)
        rules = GroupRules(
            staleness=ctx.config.sampler.staleness,
            advantage=ctx.config.trainer.advantage,
            aggregation=ctx.config.trainer.aggregation,
            level=ctx.config.trainer.level,
            budget_tokens=ctx.config.trainer.micro_batch_tokens,
            max_positions=max_positions(ctx.config.policy.model),
            scores=score_rules(ctx.config.scorer),
            distils=ctx.config.trainer.distillation_coefficient > 0,
        )
        scored = bool(rules.scores.kinds)
        handler = PackerHandler(
            ctx.run,
            versions,
            rules,
            rollout_s=ctx.config.sampler.rollout_timeout_s,
            wait_s=ctx.config.scorer.wait_s,
            partitions=ctx.config.log.partitions,
        )
        async with anyio.create_task_group() as group:
            group.start_soon(versions.follow, ctx.log)
            await versions.first(VERSION_READY_S)
            await run_transform(
                ctx.log,
                ("trajectories", "rewards", "scores") if scored else ("trajectories", "rewards"),
                group=ctx.group("packer"),
                member=ctx.member,
                handler=handler,
                stopping=ctx.stopping,
                remember=CLOSED,
                mine=handler.mine,
                dead_letters=ctx.dead_letters,
                late=handler.late,
            )
            group.cancel_scope.cancel()


def score_rules(section: ScorerSection) -> ScoreRules:
    """What the packer waits for."""
    return ScoreRules(
        repeats=section.enabled and section.repeats > 0,
        teacher=section.enabled and bool(section.teachers),
        reduce=section.reduce,
        required=section.missing == "filter",
    )


@dataclass(slots=True)
class OpenGroup:
    """What has arrived of a group; `positions` stay uncommitted until it is packed."""

    heard_s: float
    """When it was first heard of, by `Listening.listened_s`."""
    written_s: float
    """The time that its first message bears, seconds since the epoch."""
    trajectories: dict[Life, Trajectory] = field(default_factory=dict)
    rewards: dict[Life, Reward] = field(default_factory=dict)
    scores: dict[Life, list[Score]] = field(default_factory=dict)
    positions: list[Position] = field(default_factory=list)
    graded_s: float | None = None
    """When nothing but scores was missing any more, by `Listening.listened_s`."""

    def take(self, record: Trajectory | Reward | Score) -> None:
        """The first one of each life counts."""
        life = record.rollout_id, record.life
        match record:
            case Trajectory():
                self.trajectories.setdefault(life, record)
            case Reward():
                self.rewards.setdefault(life, record)
            case Score():
                known = self.scores.setdefault(life, [])
                if record.kind not in {score.kind for score in known}:
                    known.append(record)

    def scored(self, kinds: frozenset[str]) -> bool:
        """Whether every member that is graded has each of these kinds of score, be it one without log-probs."""
        return all(
            kinds <= {score.kind for score in member.own(self.scores) or ()}
            for member in self.members()
            if member.gradable
        )

    def finished(self) -> list[tuple[Trajectory, Reward | None]] | None:
        """Every member with its reward, in the order of samples; None while one is missing."""
        members = self.members()
        if not members or len(members) < members[0].request.group_size:
            return None
        if not all(map(self._is_decided, members)):
            return None
        return [(member, member.own(self.rewards)) for member in members]

    def members(self) -> list[Trajectory]:
        """One trajectory of each rollout, in the order of samples: the first that is decided, before any that is not.

        A rollout whose worker was killed runs again, and whether its first life will have a reward is not known.
        """
        counts: dict[str, Trajectory] = {}
        for trajectory in sorted(self.trajectories.values(), key=self._is_decided, reverse=True):
            counts.setdefault(trajectory.rollout_id, trajectory)
        return sorted(counts.values(), key=lambda trajectory: trajectory.request.sample)

    def _is_decided(self, trajectory: Trajectory) -> bool:
        """Whether it has a reward of its own, or none will ever come."""
        return not trajectory.gradable or trajectory.own(self.rewards) is not None


class PackerHandler:
    """Holds the messages of open groups; of a rollout that ran twice one trajectory counts, with what is said of it.

    `rollout_s`: how long a rollout may last from its request on. `wait_s`: how long a group that lacks only scores is
    held. After a restart both begin anew. `partitions`: of each topic that is partitioned by group.
    """

    def __init__(
        self,
        run: str,
        versions: Versions,
        rules: GroupRules,
        *,
        rollout_s: float = 900.0,
        wait_s: float = 30.0,
        partitions: int = GROUP_PARTITIONS,
    ) -> None:
        self.run_name, self.versions, self.rules = run, versions, rules
        self.rollout_s, self.wait_s, self.partitions = rollout_s, wait_s, partitions
        self.open: dict[int, dict[str, OpenGroup]] = {}
        self.closed: dict[int, set[str]] = {}
        self.time: dict[int, Listening] = {}

    def mine(self, delivered: Delivered) -> bool:
        """Whether a message of groups.closed is of this run."""
        return _closed_group(delivered, self.run_name) is not None

    def assigned(self, partition: int, replay: Sequence[Delivered]) -> None:
        """`replay`: what is `mine` of groups.closed; those groups are done."""
        self.open[partition] = {}
        self.closed[partition] = {name for one in replay if (name := _closed_group(one, self.run_name)) is not None}
        self.time[partition] = Listening(time.monotonic())

    def revoked(self, partition: int) -> None:
        self.open.pop(partition, None)
        self.closed.pop(partition, None)
        self.time.pop(partition, None)

    async def handle(self, delivered: Delivered) -> Outcome:
        record = delivered.record()
        if not isinstance(record, Trajectory | Reward | Score) or record.run != self.run_name:
            return Emit()
        if not isinstance(record, Score) and _purpose(record) == "eval":
            return Emit(*_evaluated(record))
        partition = delivered.position.partition
        if (right := partition_of(record, self.partitions)) != partition:
            raise DataError(f"{delivered.position}: {record.group_id} belongs on partition {right}, not here")
        if not record.rollout_id:
            raise DataError(f"{delivered.position}: rollout_id is empty: nobody asked for this")
        log_s, now = delivered.timestamp_ms / 1000, self.time[partition]
        now.hear(log_s)
        if record.group_id in self.closed[partition]:
            telemetry.LATE.inc()
            return Emit()
        group = self.open[partition].setdefault(record.group_id, OpenGroup(now.listened_s, log_s))
        group.take(record)
        group.positions.append(delivered.position)
        return self._close(partition, record.group_id) or Hold()

    def late(self, partition: int) -> Emit | None:
        """Close the groups that have waited long enough: for scores, or for members."""
        telemetry.HELD.set(sum(map(len, self.open.values())))
        self.time[partition].turn(time.monotonic())
        closed = [*self._unscored(partition), *self._overdue(partition)]
        if not closed:
            return None
        records = [record for emit in closed for record in emit.records]
        return Emit(*records, done=[position for emit in closed for position in emit.done])

    def _unscored(self, partition: int) -> list[Emit]:
        overdue = [name for name, group in self.open[partition].items() if self._gave_time(partition, group)]
        closed = [emit for name in overdue if (emit := self._close(partition, name)) is not None]
        telemetry.UNSCORED.inc(len(closed))
        return closed

    def _overdue(self, partition: int) -> list[Emit]:
        now, groups = self.time[partition], self.open[partition]
        overdue = [
            name for name, group in groups.items() if now.overdue(group.heard_s, group.written_s, self.rollout_s)
        ]
        return [self._give_up(partition, name) for name in overdue]

    def _give_up(self, partition: int, group_id: str) -> Emit:
        """The batch of a group that lacks members; rewards and scores of no rollout at all are passed over."""
        group = self.open[partition][group_id]
        if not group.trajectories:
            del self.open[partition][group_id]
            log.warning("%s: %d messages of no rollout are passed over", group_id, len(group.positions))
            return Emit(done=group.positions)
        members = group.members()
        batch = incomplete_batch(members)
        log.error("%s: %d of %d members came", group_id, len(members), len(batch.members))
        telemetry.INCOMPLETE.inc()
        return self._closing(partition, batch)

    def _close(self, partition: int, group_id: str) -> Emit | None:
        group = self.open[partition][group_id]
        finished = group.finished()
        if finished is None or not self._has_scores(partition, group):
            return None
        scores = {member.rollout_id: member.own(group.scores) or () for member, _ in finished}
        batch = _fitting(pack_group(finished, self.versions.head, self.versions.forks, self.rules, scores))
        for member in batch.members:
            telemetry.PACKED.labels(member.fate).inc()
        return self._closing(partition, batch)

    def _closing(self, partition: int, batch: PackedBatch) -> Emit:
        """Everything that is written of a group, and the one place where a group ceases to be open."""
        group = self.open[partition].pop(batch.group_id)
        self.closed[partition].add(batch.group_id)
        closed = GroupClosed(run=batch.run, group_id=batch.group_id)
        return Emit(batch, *_entries(batch), closed, done=group.positions)

    def _has_scores(self, partition: int, group: OpenGroup) -> bool:
        """Of a group that is otherwise complete: its scores are there, or it has waited long enough for them."""
        if group.scored(self.rules.scores.kinds):
            return True
        if group.graded_s is None:
            group.graded_s = self.time[partition].listened_s
        return self._gave_time(partition, group)

    def _gave_time(self, partition: int, group: OpenGroup) -> bool:
        """Whether a group that lacks only scores has been held for long enough."""
        return group.graded_s is not None and self.time[partition].listened_s - group.graded_s > self.wait_s


def _fitting(batch: PackedBatch) -> PackedBatch:
    """The batch, or one without rows if the topic does not take it: fewer members would bias the group's advantages."""
    try:
        seal(batch)
    except DataError as error:
        log.error("%s: too large to be learnt from: %s", batch.group_id, error)
        return without_rows(batch, f"too_large: {error}")
    return batch


def _closed_group(delivered: Delivered, run: str) -> str | None:
    """The group of a message of groups.closed, by its key where it cannot be read; None for another run's."""
    try:
        record = delivered.record()
    except DecodeError as error:
        log.error("known by its key alone: %s", error)
        return (delivered.key or b"").decode(errors="replace") or None
    return record.group_id if isinstance(record, GroupClosed) and record.run == run else None


def _purpose(record: Trajectory | Reward) -> str:
    return record.purpose if isinstance(record, Reward) else record.request.purpose


def _entries(batch: PackedBatch) -> list[Record]:
    return [_entry(batch, member.rollout_id, _state(member.fate), member.reason) for member in batch.members]


def _evaluated(record: Trajectory | Reward) -> list[Record]:
    """An evaluation rollout ends with its reward."""
    if isinstance(record, Trajectory):
        return []
    state: State = "evaluated" if record.status == "graded" else "failed"
    return [_entry(record, record.rollout_id, state, record.error_class)]


def _entry(record: PackedBatch | Reward, rollout_id: str, state: State, reason: str) -> LedgerEntry:
    return LedgerEntry(
        run=record.run, group_id=record.group_id, rollout_id=rollout_id, state=state, reason=reason, stage="packer"
    )


def _state(fate: str) -> State:
    match fate:
        case "packed" | "filtered" | "stale" | "failed" | "cancelled":
            return fate
    raise DataError(f"no such fate: {fate}")
