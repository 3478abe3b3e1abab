"""Packer: joins the trajectories, rewards and scores of a group and writes it as one tree-packed batch.

In:      trajectories, rewards, scores (if a scorer runs); policy.versions (to know what is stale)
Out:     batches, ledger (packed, filtered, stale, failed, cancelled, evaluated)
Key:     group_id
Commits: the low-watermark of open groups, in the transaction that writes the batch
Fails:   a record that cannot be read is a dead letter; a turn that cannot be trained is a counted filter; a group that
         lacks members long after its requests' deadline is closed as failed (incomplete)
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
from kat_stream.log.outcome import Emit, Hold, Outcome
from kat_stream.log.stages import run_transform
from kat_stream.policy import max_positions
from kat_stream.rl.group import GroupRules, pack_group
from kat_stream.rl.incomplete import incomplete_batch
from kat_stream.rl.scores import ScoreRules
from kat_stream.service import Context
from kat_stream.versions import Versions
from topics import LedgerEntry, PackedBatch, Record, Reward, Score, Trajectory, partition_of
from topics.ledger import State

log = logging.getLogger(__name__)

VERSION_READY_S = 180.0
REMEMBERED = 10_000
"""Newest groups of a partition whose late duplicates are known as such."""
GRACE_S = 900.0
"""After the deadline of its requests a group is given so long to be ended, graded and read."""
IDLE_S = 60.0
"""So long after its last message a partition's time is the wall clock's."""


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
        )
        scored = bool(rules.scores.kinds)
        handler = PackerHandler(ctx.run, versions, rules, wait_s=ctx.config.scorer.wait_s)
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
                remember="batches",
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

    trajectories: dict[str, Trajectory] = field(default_factory=dict)
    rewards: dict[str, Reward] = field(default_factory=dict)
    scores: dict[str, list[Score]] = field(default_factory=dict)
    positions: list[Position] = field(default_factory=list)
    since_s: float = 0.0
    """Log time of its first message, seconds since the epoch."""
    graded_at: float | None = None
    """When nothing but scores was missing any more, on the monotonic clock."""

    def take(self, record: Trajectory | Reward | Score) -> None:
        """The first one counts."""
        match record:
            case Trajectory():
                self.trajectories.setdefault(record.rollout_id, record)
            case Reward():
                self.rewards.setdefault(record.rollout_id, record)
            case Score():
                known = self.scores.setdefault(record.rollout_id, [])
                if record.kind not in {score.kind for score in known}:
                    known.append(record)

    def scored(self, kinds: frozenset[str]) -> bool:
        """Whether every member that is graded has each of these kinds of score, be it one without log-probs."""
        return all(
            kinds <= {score.kind for score in self.scores.get(member.rollout_id, ())}
            for member in self.trajectories.values()
            if member.gradable
        )

    @property
    def deadline_s(self) -> float:
        """When all its rollouts had to be over; without a trajectory that says so, when it was first heard of."""
        return max((member.request.deadline_unix_s for member in self.trajectories.values()), default=self.since_s)

    def finished(self) -> list[tuple[Trajectory, Reward | None]] | None:
        """Every member with its reward, in the order of samples; None while one is missing."""
        members = sorted(self.trajectories.values(), key=lambda trajectory: trajectory.request.sample)
        if not members or len(members) < members[0].request.group_size:
            return None
        if any(member.gradable and member.rollout_id not in self.rewards for member in members):
            return None
        return [(member, self.rewards.get(member.rollout_id)) for member in members]


class PackerHandler:
    """Holds the messages of open groups; the first trajectory, reward and score of a rollout count.

    `wait_s`: how long a group that lacks only scores is held. Time is the log's, so that what piled up while this
    stage was away is read before anything of it is given up.
    """

    def __init__(self, run: str, versions: Versions, rules: GroupRules, *, wait_s: float = 30.0) -> None:
        self.run_name, self.versions, self.rules, self.wait_s = run, versions, rules, wait_s
        self.open: dict[int, dict[str, OpenGroup]] = {}
        self.packed: dict[int, dict[str, None]] = {}
        """Oldest first, at most REMEMBERED."""
        self.heard: dict[int, tuple[float, float]] = {}
        """Of each partition: the newest log time (s since the epoch), and when (monotonic) it came."""

    def assigned(self, partition: int, replay: Sequence[Delivered]) -> None:
        """`replay`: what this stage wrote to `batches` so far; those groups are done."""
        self.open[partition] = {}
        self.packed[partition] = {}
        for delivered in replay:
            self._remember(partition, _group_of(delivered))
        self.heard[partition] = (0.0, time.monotonic())

    def revoked(self, partition: int) -> None:
        self.open.pop(partition, None)
        self.packed.pop(partition, None)
        self.heard.pop(partition, None)

    async def handle(self, delivered: Delivered) -> Outcome:
        record = delivered.record()
        if not isinstance(record, Trajectory | Reward | Score) or record.run != self.run_name:
            return Emit()
        if not isinstance(record, Score) and _purpose(record) == "eval":
            return Emit(*_evaluated(record))
        partition = partition_of(record)
        if partition != delivered.position.partition:
            raise DataError(f"{delivered.position}: {record.group_id} belongs on partition {partition}, not here")
        if not record.rollout_id:
            raise DataError(f"{delivered.position}: rollout_id is empty: nobody asked for this")
        log_s = delivered.timestamp_ms / 1000
        self.heard[partition] = (max(log_s, self.heard[partition][0]), time.monotonic())
        if record.group_id in self.packed[partition]:
            return Emit()
        group = self.open[partition].setdefault(record.group_id, OpenGroup(since_s=log_s))
        group.take(record)
        group.positions.append(delivered.position)
        return self._close(partition, record.group_id) or Hold()

    def late(self, partition: int) -> Emit | None:
        """Close the groups that have waited long enough: for scores, or for members."""
        telemetry.HELD.set(sum(map(len, self.open.values())))
        closed = [*self._unscored(partition), *self._overdue(partition)]
        if not closed:
            return None
        records = [record for emit in closed for record in emit.records]
        return Emit(*records, done=[position for emit in closed for position in emit.done])

    def _unscored(self, partition: int) -> list[Emit]:
        overdue = [
            name for name, group in self.open.get(partition, {}).items()
            if group.graded_at is not None and time.monotonic() - group.graded_at > self.wait_s
        ]  # fmt: skip
        closed = [emit for name in overdue if (emit := self._close(partition, name)) is not None]
        telemetry.UNSCORED.inc(len(closed))
        return closed

    def _overdue(self, partition: int) -> list[Emit]:
        now_s = self._now_s(partition)
        groups = self.open.get(partition, {})
        overdue = [name for name, group in groups.items() if now_s > group.deadline_s + GRACE_S]
        return [self._give_up(partition, name) for name in overdue]

    def _now_s(self, partition: int) -> float:
        log_s, heard = self.heard.get(partition, (0.0, time.monotonic()))
        return log_s if time.monotonic() - heard < IDLE_S else max(log_s, time.time())

    def _give_up(self, partition: int, group_id: str) -> Emit:
        """A group that came in time is closed; what came after its deadline alone repeats a group closed long ago."""
        group = self.open[partition].pop(group_id)
        self._remember(partition, group_id)
        if not group.trajectories or group.since_s > group.deadline_s:
            log.warning("%s: %d late messages are passed over", group_id, len(group.positions))
            return Emit(done=group.positions)
        batch = incomplete_batch(list(group.trajectories.values()))
        log.error("%s: %d of %d members came", group_id, len(group.trajectories), len(batch.members))
        telemetry.INCOMPLETE.inc()
        return Emit(batch, *_entries(batch), done=group.positions)

    def _close(self, partition: int, group_id: str) -> Emit | None:
        group = self.open[partition][group_id]
        finished = group.finished()
        if finished is None or not self._has_scores(group):
            return None
        batch = pack_group(finished, self.versions.head, self.versions.forks, self.rules, group.scores)
        del self.open[partition][group_id]
        self._remember(partition, group_id)
        for member in batch.members:
            telemetry.PACKED.labels(member.fate).inc()
        return Emit(batch, *_entries(batch), done=group.positions)

    def _remember(self, partition: int, group_id: str) -> None:
        packed = self.packed[partition]
        packed[group_id] = None
        if len(packed) > REMEMBERED:
            del packed[next(iter(packed))]

    def _has_scores(self, group: OpenGroup) -> bool:
        """Of a group that is otherwise complete: its scores are there, or it has waited long enough for them."""
        if group.scored(self.rules.scores.kinds):
            return True
        group.graded_at = group.graded_at or time.monotonic()
        return time.monotonic() - group.graded_at > self.wait_s


def _group_of(delivered: Delivered) -> str:
    """The group of a message; its key says so, too, where it cannot be read."""
    try:
        return str(getattr(delivered.record(), "group_id", ""))
    except DecodeError:
        return (delivered.key or b"").decode(errors="replace")


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
