"""Trainer: gathers the groups of a step, makes the step, publishes the weights.

In:      batches, from the positions in its own checkpoint; policy.versions (earlier lineages); rollout.requests and
         rewards (whether the run goes on, where a group does not come)
Out:     policy.versions, train.steps, ledger (trained, stale)
Key:     run and lineage, run, rollout_id
Commits: positions and manifest inside the checkpoint; a restart seeks there and opens a new lineage
Fails:   a step whose groups do not come, while nothing of the run is asked for or ends any more for longer than a group
         can stay open (sampler.rollout_timeout_s and 15 minutes), stops the service with what it waited for;
         a trainer that another one has followed is fenced: it can neither publish nor save, and stops
"""

from __future__ import annotations

import logging
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence

import anyio

from kat_stream import telemetry
from kat_stream.curriculum import Groups, group_of, number_of
from kat_stream.errors import DataError, DeadlineExceeded, StepCancelled, StorageError
from kat_stream.log.base import Delivered, Follower, Position, Writer
from kat_stream.log.handling import dead_letter
from kat_stream.log.message import seal
from kat_stream.log.outcome import Reject
from kat_stream.observe.lineages import time_of_step
from kat_stream.observe.signs import Signs
from kat_stream.observe.stage_lag import newest_step
from kat_stream.policy import model_dir
from kat_stream.rl.incomplete import GRACE_S
from kat_stream.rl.staleness import age
from kat_stream.rl.step import Step, assemble, batch_digest, check_group, without_rows
from kat_stream.service import Context
from kat_stream.training.checkpoint import Checkpoint, CheckpointStore, latest_checkpoint
from kat_stream.training.learner import TorchLearner
from kat_stream.training.publication import Publication
from kat_stream.training.settings import digest, make_learner
from kat_stream.training.weights import prune, take_over
from kat_stream.versions import Versions
from topics import GroupMember, LedgerEntry, PackedBatch, PolicyVersion, Record, TrainStep, format_version
from topics.ledger import State

log = logging.getLogger(__name__)

POLL_S = 0.2
DISK_S, DISK_RETRY_S = 120.0, 2.0
"""How long a full disk is waited for, and how often it is tried."""
LEDGER_S = 60.0
"""Longest time to read what became of a group."""
BAD_BATCH = "bad_batch"
"""Why rollouts are filtered whose batch on the log cannot be used."""
Arrival = tuple[Position, PackedBatch]


class Trainer:
    """One life of the learner: a lineage."""

    learner: TorchLearner
    writer: Writer
    versions: Versions
    store: CheckpointStore

    def __init__(self) -> None:
        self.lineage = uuid.uuid4().hex[:6]
        self.parent: tuple[str, int] = ("", -1)
        """Lineage and step that this lineage goes on from, if it is not the first."""
        self.checkpoint = ""
        """Version of the newest checkpoint; empty: the model as it ships."""
        self.announced_step = -1
        self.positions: dict[str, int] = {}
        self.manifest: tuple[str, ...] = ()
        self.groups = Groups()
        """All that entered a step."""
        self.saved_step = -1
        self.arrived: deque[Delivered] = deque()
        self.met: set[str] = set()
        """Groups that arrived in this life."""
        self.newest_s = 0.0
        """`unix_s` of the run's newest step, whoever made it."""

    async def run(self, ctx: Context) -> None:
        """Fence whoever wrote before, then look at what was written: in this order nothing is overlooked."""
        name = ctx.group("trainer")
        self.writer = await ctx.log.writer(name, group=name)
        try:
            self.versions = Versions(ctx.run)
            await self.versions.load(ctx.log)
            before = await newest_step(ctx.log, ctx.run)
            self.newest_s = before.unix_s if before is not None else 0.0
            await anyio.to_thread.run_sync(self._open, ctx)
            await self._publish(ctx)
            await self._train(ctx)
        finally:
            with anyio.CancelScope(shield=True):
                await self.writer.close()

    async def _train(self, ctx: Context) -> None:
        durable = not ctx.config.log.url.startswith("memory:")
        start = {("batches", int(partition)): offset for partition, offset in self.positions.items()} if durable else {}
        async with ctx.log.follow(("batches",), start=start, poll_s=POLL_S) as follower:
            try:
                while self.learner.step_count < ctx.config.run.steps and not ctx.stopping.is_set():
                    groups = await self._gather(ctx, follower)
                    if groups is not None:
                        await self._step(ctx, groups)
                await ctx.stopping.wait()
            finally:
                with anyio.CancelScope(shield=True):
                    await anyio.to_thread.run_sync(self._save, ctx)
                    await anyio.to_thread.run_sync(self.learner.close)

    @property
    def version(self) -> str:
        return format_version(self.lineage, self.learner.step_count)

    def _open(self, ctx: Context) -> None:
        """Model and optimizer as the newest checkpoint of the living branch left them, or as they ship."""
        import torch

        torch.set_num_threads(ctx.config.trainer.threads)
        torch.manual_seed(ctx.config.run.seed)
        self.learner = make_learner(ctx.config, model_dir(ctx.config.policy.model))
        self.store = CheckpointStore(ctx.run_dir / "checkpoints", self.lineage)
        self.store.open()
        self.parent = self.versions.root
        checkpoint = latest_checkpoint(self.store.directory, self._on_branch)
        if checkpoint is not None:
            self.learner.load(checkpoint.state)
            self.parent = (checkpoint.lineage, checkpoint.step)
            self.checkpoint = format_version(*self.parent)
            self.positions = dict(checkpoint.positions)
            self.manifest = checkpoint.manifest
            self.groups = checkpoint.groups
            self.saved_step = checkpoint.step
            log.info("resumed at step %d of lineage %s", *reversed(self.parent))
        take_over(ctx.run_dir / "weights", self.versions.head if self.versions.newest else "")

    def _on_branch(self, lineage: str, step: int) -> bool:
        """Not what a fenced trainer saved after this branch had left its lineage."""
        if self.versions.newest is None:
            return True
        return age(format_version(lineage, step), self.versions.head, self.versions.forks) is not None

    async def _gather(self, ctx: Context, follower: Follower) -> list[Arrival] | None:
        """The next groups of one step, in the order of the log; None if the service must stop first."""
        wanted = ctx.config.sampler.groups_per_step
        groups: list[Arrival] = []
        while len(groups) < wanted:
            which = f"group {len(groups) + 1} of {wanted} for step {self.learner.step_count + 1}"
            found = await self._await_group(ctx, follower, which)
            if found is None:
                return None
            groups.append(found)
        return groups

    async def _await_group(self, ctx: Context, follower: Follower, which: str) -> Arrival | None:
        """The next group; None if the service must stop first.

        An evaluation or slow rollouts may hold it up for any time, and they show on the log. DeadlineExceeded if
        nothing does for so long that the packer would have closed any group by now, be it as incomplete.
        """
        still_s = ctx.config.sampler.rollout_timeout_s + GRACE_S
        signs = Signs(ctx.log, ctx.run)
        began = looked = went_on = time.monotonic()
        while not ctx.stopping.is_set():
            found = await self._next(ctx, follower)
            if found is not None:
                return found
            now = time.monotonic()
            if now - looked <= ctx.config.trainer.step_timeout_s:
                continue
            looked = now
            if await signs.since_last_look():
                went_on = now
            elif now - went_on > still_s:
                raise DeadlineExceeded(f"{which}, or any sign that the run goes on", now - went_on)
            log.warning("waiting for %s for %.0f s; the run went on %.0f s ago", which, now - began, now - went_on)
        return None

    async def _next(self, ctx: Context, follower: Follower) -> Arrival | None:
        """One group of this run, or None if none came within a moment.

        What cannot be read is a dead letter; a group of ours among them still counts, with nothing in it to learn.
        """
        self.arrived.extend(await follower.poll(0 if self.arrived else POLL_S))
        while self.arrived:
            delivered = self.arrived.popleft()
            record: Record | None = None
            try:
                record = delivered.record()
                if isinstance(record, PackedBatch) and record.run == ctx.run:
                    check_group(record, self.learner.vocabulary, self.learner.max_positions, self.learner.routing)
                    self.met.add(record.group_id)
                    return delivered.position, record
            except DataError as error:
                group = record if isinstance(record, PackedBatch) else await self._lost_group(ctx, delivered)
                await self._bury(ctx, delivered, group, error)
                if group is not None:
                    return delivered.position, without_rows(group, f"{BAD_BATCH}: {error}")
        return None

    async def _bury(self, ctx: Context, delivered: Delivered, group: PackedBatch | None, error: DataError) -> None:
        """A dead letter, and a last word on the rollouts that were packed in it."""
        letter = dead_letter(delivered, ctx.group("trainer"), Reject(str(error), type(error).__name__))
        packed = [member.rollout_id for member in group.members if member.fate == "packed"] if group else []
        entries = [
            LedgerEntry(
                run=ctx.run,
                group_id=group_of(rollout_id),
                rollout_id=rollout_id,
                state="filtered",
                reason=f"{BAD_BATCH}: {error}",
                stage="trainer",
            )
            for rollout_id in filter(None, packed)
        ]
        await ctx.log.publish(letter, *entries)

    async def _lost_group(self, ctx: Context, delivered: Delivered) -> PackedBatch | None:
        """The group whose batch cannot be decoded, from its key and the ledger; None if none of ours waits for it.

        In a second life the ledger has this trainer's own word already, and the group must count again.
        """
        group_id = (delivered.key or b"").decode(errors="replace")
        newest = await self._entries_of(ctx, group_id, delivered.position.partition)
        if not newest or group_id in self.met or any(entry.state == "trained" for entry in newest.values()):
            return None
        self.met.add(group_id)
        members = []
        for rollout_id, entry in sorted(newest.items()):
            fate = "packed" if entry.reason.startswith(BAD_BATCH) else entry.state
            members.append(GroupMember(rollout_id=rollout_id, fate=fate, reason=entry.reason))
        return PackedBatch(run=ctx.run, group_id=group_id, task_id="", members=tuple(members))

    async def _entries_of(self, ctx: Context, group_id: str, partition: int) -> dict[str, LedgerEntry]:
        newest: dict[str, LedgerEntry] = {}
        async with ctx.log.follow(("ledger",), partitions=[partition]) as follower:
            async for delivered in follower.catch_up(LEDGER_S):
                try:
                    entry = delivered.record()
                except DataError:
                    continue
                if isinstance(entry, LedgerEntry) and (entry.run, entry.group_id) == (ctx.run, group_id):
                    newest[entry.rollout_id] = entry
        return newest

    async def _step(self, ctx: Context, arrivals: Sequence[Arrival]) -> None:
        """Gradient, weights, records, checkpoint; in this order.

        A crash before the checkpoint leaves a step that was announced and is made again: in a new lineage, and the
        announced one belongs to the abandoned end of the old. The other way round a trained rollout could go unnamed.
        """
        began = time.monotonic()
        head = self.version
        step = assemble([group for _, group in arrivals], head, self.versions.forks, ctx.config.sampler.staleness)
        try:
            metrics = await anyio.to_thread.run_sync(self._learn, step, ctx.stopping.is_set)
        except StepCancelled as reason:
            log.info("%s", reason)
            return
        for position, _ in arrivals:
            self.positions[str(position.partition)] = position.offset + 1
        self.manifest = step.trained
        self.groups = self.groups.added(map(number_of, step.groups))
        seconds = time.monotonic() - began
        self.newest_s = time_of_step(time.time(), self.newest_s)
        telemetry.STEPS.inc()
        telemetry.STEP_SECONDS.observe(seconds)
        telemetry.TRAIN_BUSY.inc(seconds)
        metrics |= {"reward_mean": step.reward_mean, "step_seconds": seconds}
        made = TrainStep(
            run=ctx.run,
            lineage=self.lineage,
            step=self.learner.step_count,
            metrics=metrics,
            groups=step.groups,
            trained=step.trained,
            stale=step.stale,
            positions=dict(self.positions),
            unix_s=self.newest_s,
            batches=tuple((position.partition, position.offset) for position, _ in arrivals),
            version=head,
            checkpoint=self.checkpoint,
            seed=ctx.config.run.seed,
            threads=ctx.config.trainer.threads,
            batch_sha256=batch_digest(step.batch),
            learner_sha256=digest(self.learner.config),
        )
        await self._publish(ctx, [made, *self._entries(made)])
        made_all = self.learner.step_count == ctx.config.run.steps
        if made_all or self.learner.step_count % ctx.config.trainer.checkpoint_every == 0:
            await self._save_if_possible(ctx)

    def _learn(self, step: Step, should_stop: Callable[[], bool]) -> dict[str, float]:
        if not step.teaches:
            self.learner.skip_step()
            return {"applied": 0.0}
        for versions in step.batch.ages:
            telemetry.STALENESS.observe(versions)
        return self.learner.step(step.batch, should_stop).as_dict()

    def _entries(self, step: TrainStep) -> list[Record]:
        """The fate of every rollout of the step."""
        fates: list[tuple[str, State]] = [(rollout_id, "trained") for rollout_id in step.trained]
        fates += [(rollout_id, "stale") for rollout_id in step.stale]
        return [
            LedgerEntry(
                run=step.run,
                group_id=group_of(rollout_id),
                rollout_id=rollout_id,
                state=state,
                step=step.step,
                lineage=step.lineage,
                stage="trainer",
            )
            for rollout_id, state in fates
        ]

    async def _publish(self, ctx: Context, records: Sequence[Record] = ()) -> None:
        """The present weights as a policy version, and the records of the step that made them, in one transaction.

        `FencedError` if another trainer has followed. `LogUnavailable`: whether it was written is not known; to ask
        would mean to open the writer again, and a trainer that stood still would fence the living. It stops instead.
        """
        publication = await self._write_weights(ctx)
        version = PolicyVersion(
            run=ctx.run,
            model=ctx.config.policy.name,
            lineage=self.lineage,
            number=self.learner.step_count,
            path=str(publication.path.absolute()),
            checksum=publication.checksum,
            parent_lineage=self.parent[0],
            parent_number=self.parent[1],
            groups_below=self.groups.below,
            groups_beyond=self.groups.beyond,
        )
        await self.writer.commit([seal(record) for record in (*records, version)], {})
        self.announced_step = version.number
        self.versions.take(version)
        await anyio.to_thread.run_sync(prune, ctx.run_dir / "weights", self.lineage, ctx.config.trainer.keep_weights)

    async def _write_weights(self, ctx: Context) -> Publication:
        """A full disk is waited for: the step is made, and somebody may make room."""
        directory = ctx.run_dir / "weights" / self.version
        give_up = time.monotonic() + DISK_S
        while True:
            try:
                return await anyio.to_thread.run_sync(self.learner.publish, directory)
            except StorageError as error:
                log.error("waiting for the disk: %s", error)
                if time.monotonic() > give_up or await ctx.stopped_within(DISK_RETRY_S):
                    raise

    async def _save_if_possible(self, ctx: Context) -> None:
        """In the middle of a run a checkpoint that cannot be written is missed, not fatal: the last one still holds."""
        try:
            await anyio.to_thread.run_sync(self._save, ctx)
        except StorageError as error:
            log.error("no checkpoint of step %d: %s", self.learner.step_count, error)

    def _save(self, ctx: Context) -> None:
        """The present state, unless it is saved or was never announced: a step that nobody knows must not count."""
        if self.learner.step_count in (0, self.saved_step) or self.announced_step != self.learner.step_count:
            return
        checkpoint = Checkpoint(
            state=self.learner.state_dict(),
            lineage=self.lineage,
            positions=dict(self.positions),
            manifest=self.manifest,
            groups=self.groups,
        )
        self.store.save(checkpoint, keep=ctx.config.trainer.keep_checkpoints)
        self.saved_step = self.learner.step_count
        self.checkpoint = self.version
