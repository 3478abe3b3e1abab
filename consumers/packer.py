"""Packer: joins the trajectories and rewards of a group and writes it as one tree-packed batch.

In:      trajectories, rewards; policy.versions (to know what is stale)
Out:     batches, ledger (packed, filtered, stale, failed, cancelled, evaluated)
Key:     group_id
Commits: the low-watermark of open groups, in the transaction that writes the batch
Fails:   a record that cannot be read is a dead letter; a turn that cannot be trained is a counted filter
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import anyio

from kat_stream import telemetry
from kat_stream.errors import DataError, DecodeError
from kat_stream.log.base import Delivered, Position
from kat_stream.log.outcome import Emit, Hold, Outcome
from kat_stream.log.stages import run_transform
from kat_stream.policy import max_positions
from kat_stream.rl.group import GroupRules, pack_group
from kat_stream.service import Context
from kat_stream.versions import Versions
from topics import LedgerEntry, PackedBatch, Record, Reward, Trajectory, partition_of
from topics.ledger import State

VERSION_READY_S = 180.0


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
        )
        async with anyio.create_task_group() as group:
            group.start_soon(versions.follow, ctx.log)
            await versions.first(VERSION_READY_S)
            await run_transform(
                ctx.log,
                ("trajectories", "rewards"),
                group=ctx.group("packer"),
                member=ctx.member,
                handler=PackerHandler(ctx.run, versions, rules),
                stopping=ctx.stopping,
                remember="batches",
                dead_letters=ctx.dead_letters,
            )
            group.cancel_scope.cancel()


@dataclass(slots=True)
class OpenGroup:
    """What has arrived of a group; `positions` stay uncommitted until it is packed."""

    trajectories: dict[str, Trajectory] = field(default_factory=dict)
    rewards: dict[str, Reward] = field(default_factory=dict)
    positions: list[Position] = field(default_factory=list)

    def finished(self) -> list[tuple[Trajectory, Reward | None]] | None:
        """Every member with its reward, in the order of samples; None while one is missing."""
        members = sorted(self.trajectories.values(), key=lambda trajectory: trajectory.request.sample)
        if not members or len(members) < members[0].request.group_size:
            return None
        if any(member.gradable and member.rollout_id not in self.rewards for member in members):
            return None
        return [(member, self.rewards.get(member.rollout_id)) for member in members]


class PackerHandler:
    """Holds the messages of open groups; the first trajectory and the first reward of a rollout count."""

    def __init__(self, run: str, versions: Versions, rules: GroupRules) -> None:
        self.run_name, self.versions, self.rules = run, versions, rules
        self.open: dict[int, dict[str, OpenGroup]] = {}
        self.packed: dict[int, set[str]] = {}

    def assigned(self, partition: int, replay: Sequence[Delivered]) -> None:
        """`replay`: what this stage wrote to `batches` so far; those groups are done."""
        self.open[partition] = {}
        self.packed[partition] = {_group_of(delivered) for delivered in replay}

    def revoked(self, partition: int) -> None:
        self.open.pop(partition, None)
        self.packed.pop(partition, None)

    async def handle(self, delivered: Delivered) -> Outcome:
        record = delivered.record()
        if not isinstance(record, Trajectory | Reward) or record.run != self.run_name:
            return Emit()
        if _purpose(record) == "eval":
            return Emit(*_evaluated(record))
        partition = partition_of(record)
        if partition != delivered.position.partition:
            raise DataError(f"{delivered.position}: {record.group_id} belongs on partition {partition}, not here")
        if not record.rollout_id:
            raise DataError(f"{delivered.position}: rollout_id is empty: nobody asked for this")
        if record.group_id in self.packed[partition]:
            return Emit()
        group = self.open[partition].setdefault(record.group_id, OpenGroup())
        kind: dict[str, Trajectory] | dict[str, Reward]
        kind = group.trajectories if isinstance(record, Trajectory) else group.rewards
        kind.setdefault(record.rollout_id, record)  # type: ignore[arg-type]
        group.positions.append(delivered.position)
        return self._close(partition, record.group_id) or Hold()

    def _close(self, partition: int, group_id: str) -> Outcome | None:
        group = self.open[partition][group_id]
        finished = group.finished()
        if finished is None:
            return None
        batch = pack_group(finished, self.versions.head, self.versions.forks, self.rules)
        del self.open[partition][group_id]
        self.packed[partition].add(group_id)
        for member in batch.members:
            telemetry.PACKED.labels(member.fate).inc()
        return Emit(batch, *_entries(batch), done=group.positions)


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
