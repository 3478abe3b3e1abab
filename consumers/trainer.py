"""Trainer: gathers the groups of a step, makes the step, publishes the weights.

In:      batches, from the positions in its own checkpoint; policy.versions (earlier lineages)
Out:     policy.versions, train.steps, ledger (trained, stale)
Key:     model, run, rollout_id
Commits: positions and manifest inside the checkpoint; a restart seeks there and opens a new lineage
Fails:   a step whose groups do not come within trainer.step_timeout_s stops the service with what it waited for
"""

from __future__ import annotations

import logging
import shutil
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import anyio

from kat_stream import telemetry
from kat_stream.config import Config
from kat_stream.curriculum import group_of
from kat_stream.errors import DataError, DeadlineExceeded, StepCancelled, StorageError
from kat_stream.log.base import Delivered, Follower, Position
from kat_stream.log.handling import dead_letter
from kat_stream.log.outcome import Reject
from kat_stream.policy import model_dir
from kat_stream.rl.staleness import forks_of
from kat_stream.rl.step import Step, assemble, check_group, without_rows
from kat_stream.rl.turn_ratio import RatioConfig
from kat_stream.service import Context
from kat_stream.training.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from kat_stream.training.learner import LearnerConfig, TorchLearner
from kat_stream.training.publication import Publication
from topics import LedgerEntry, PackedBatch, PolicyVersion, Record, TrainStep, format_version
from topics.ledger import State

log = logging.getLogger(__name__)

POLL_S = 0.2
DISK_S, DISK_RETRY_S = 120.0, 2.0
"""How long a full disk is waited for, and how often it is tried."""
Arrival = tuple[Position, PackedBatch]


def learner_config(config: Config) -> LearnerConfig:
    """The learner's part of the configuration."""
    section = config.trainer
    return LearnerConfig(
        ratio=RatioConfig(
            level=section.level,
            length_exponent=section.length_exponent,
            clip_low=section.clip_low,
            clip_high=section.clip_high,
            dual_clip=section.dual_clip,
            icepop_low=section.icepop_low,
            icepop_high=section.icepop_high,
        ),
        learning_rate=section.learning_rate,
        warmup_steps=section.warmup_steps,
        weight_decay=section.weight_decay,
        grad_clip=section.grad_clip,
        micro_batch_tokens=section.micro_batch_tokens,
    )


class Trainer:
    """One life of the learner: a lineage."""

    learner: TorchLearner

    def __init__(self) -> None:
        self.lineage = uuid.uuid4().hex[:6]
        self.parent: tuple[str, int] = ("", -1)
        """Lineage and step that this lineage goes on from, if it is not the first."""
        self.history: list[PolicyVersion] = []
        self.positions: dict[str, int] = {}
        self.manifest: tuple[str, ...] = ()
        self.saved_step = -1
        self.arrived: deque[Delivered] = deque()

    async def run(self, ctx: Context) -> None:
        await anyio.to_thread.run_sync(self._open, ctx)
        self.history = [v async for v in _versions(ctx)]
        await self._publish(ctx)
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

    @property
    def version(self) -> str:
        return format_version(self.lineage, self.learner.step_count)

    def _open(self, ctx: Context) -> None:
        """Model and optimizer as the newest checkpoint left them, or as they ship."""
        import torch

        torch.set_num_threads(ctx.config.trainer.threads)
        torch.manual_seed(ctx.config.run.seed)
        self.learner = TorchLearner(model_dir(ctx.config.policy.model), learner_config(ctx.config))
        checkpoint = latest_checkpoint(ctx.run_dir / "checkpoints")
        if checkpoint is not None:
            self.learner.load(checkpoint.state)
            self.parent = (checkpoint.lineage, checkpoint.step)
            self.positions = dict(checkpoint.positions)
            self.manifest = checkpoint.manifest
            self.saved_step = checkpoint.step
            log.info("resumed at step %d of lineage %s", *reversed(self.parent))

    async def _gather(self, ctx: Context, follower: Follower) -> list[Arrival] | None:
        """The next groups of one step, in the order of the log; None if the service must stop first."""
        wanted = ctx.config.sampler.groups_per_step
        groups: list[Arrival] = []
        progress = time.monotonic()
        while len(groups) < wanted:
            if ctx.stopping.is_set():
                return None
            found = await self._next(ctx, follower)
            if found is not None:
                groups.append(found)
                progress = time.monotonic()
            elif time.monotonic() - progress > ctx.config.trainer.step_timeout_s:
                have = f"group {len(groups) + 1} of {wanted} for step {self.learner.step_count + 1}"
                raise DeadlineExceeded(have, ctx.config.trainer.step_timeout_s)
        return groups

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
                    check_group(record)
                    return delivered.position, record
            except DataError as error:
                reject = Reject(str(error), type(error).__name__)
                await ctx.log.publish(dead_letter(delivered, "trainer", reject))
                if isinstance(record, PackedBatch):
                    return delivered.position, without_rows(record, str(error))
        return None

    async def _step(self, ctx: Context, arrivals: Sequence[Arrival]) -> None:
        """Gradient, weights, records, checkpoint; in this order.

        A crash before the checkpoint leaves a step that was announced and is made again: in a new lineage, and the
        announced one belongs to the abandoned end of the old. The other way round a trained rollout could go unnamed.
        """
        began = time.monotonic()
        step = assemble(
            [group for _, group in arrivals], self.version, forks_of(self.history), ctx.config.sampler.staleness
        )
        try:
            metrics = await anyio.to_thread.run_sync(self._learn, step, ctx.stopping.is_set)
        except StepCancelled as reason:
            log.info("%s", reason)
            return
        for position, _ in arrivals:
            self.positions[str(position.partition)] = position.offset + 1
        self.manifest = step.trained
        seconds = time.monotonic() - began
        telemetry.STEPS.inc()
        telemetry.STEP_SECONDS.observe(seconds)
        telemetry.TRAIN_BUSY.inc(seconds)
        metrics |= {"reward_mean": step.reward_mean, "step_seconds": seconds}
        await self._publish(ctx, self._records(ctx, step, metrics))
        if self.learner.step_count % ctx.config.trainer.checkpoint_every == 0:
            await self._save_if_possible(ctx)

    def _learn(self, step: Step, should_stop: Callable[[], bool]) -> dict[str, float]:
        if not step.teaches:
            self.learner.skip_step()
            return {"applied": 0.0}
        for age in step.batch.ages:
            telemetry.STALENESS.observe(age)
        return self.learner.step(step.batch, should_stop).as_dict()

    def _records(self, ctx: Context, step: Step, metrics: dict[str, float]) -> list[Record]:
        records: list[Record] = [
            TrainStep(
                run=ctx.run,
                lineage=self.lineage,
                step=self.learner.step_count,
                metrics=metrics,
                groups=step.groups,
                trained=step.trained,
                stale=step.stale,
                positions=dict(self.positions),
                unix_s=time.time(),
            )
        ]
        records += [self._entry(ctx, rollout_id, "trained") for rollout_id in step.trained]
        records += [self._entry(ctx, rollout_id, "stale") for rollout_id in step.stale]
        return records

    def _entry(self, ctx: Context, rollout_id: str, state: State) -> LedgerEntry:
        return LedgerEntry(
            run=ctx.run,
            group_id=group_of(rollout_id),
            rollout_id=rollout_id,
            state=state,
            step=self.learner.step_count,
            lineage=self.lineage,
            stage="trainer",
        )

    async def _publish(self, ctx: Context, records: Sequence[Record] = ()) -> None:
        """The present weights as a policy version, after the records of the step that made them."""
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
        )
        await ctx.log.publish(*records, version)
        self.history.append(version)
        telemetry.VERSION.set(version.number)
        await anyio.to_thread.run_sync(_prune, ctx.run_dir / "weights", self.lineage, ctx.config.trainer.keep_weights)

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
        if self.saved_step == self.learner.step_count or not self.learner.step_count:
            return
        checkpoint = Checkpoint(
            state=self.learner.state_dict(),
            lineage=self.lineage,
            positions=dict(self.positions),
            manifest=self.manifest,
        )
        save_checkpoint(self._checkpoint_dir(ctx).parent, checkpoint, keep=ctx.config.trainer.keep_checkpoints)
        self.saved_step = self.learner.step_count

    def _checkpoint_dir(self, ctx: Context) -> Path:
        return ctx.run_dir / "checkpoints" / f"step-{self.learner.step_count:06d}"


async def _versions(ctx: Context) -> AsyncIterator[PolicyVersion]:
    async with ctx.log.follow(("policy.versions",), start="earliest") as follower:
        async for delivered in follower.catch_up():
            record = delivered.record()
            if isinstance(record, PolicyVersion) and record.run == ctx.run:
                yield record


def _prune(weights: Path, lineage: str, keep: int) -> None:
    """Keep the newest weights of this lineage; engines have long loaded what is older."""
    own = [path for path in weights.iterdir() if path.name.startswith(f"{lineage}.")]
    for path in sorted(own, key=lambda path: int(path.name.rpartition(".")[2]))[:-keep]:
        shutil.rmtree(path)
