"""Sampler: asks for rollouts, evaluation rounds and training groups, as far ahead as staleness permits.

In:      the data sets; policy.versions, rollout.requests, rewards, ledger (to know where the run stands)
Out:     tasks, rollout.requests
Key:     group_id
Commits: nothing; a restart reads its own requests back and goes on after the last
Fails:   a broken data set or an engine that never takes the newest version stops the run with the reason
"""

from __future__ import annotations

import logging
import time

import aiohttp
import anyio
import msgspec

from kat_stream import telemetry
from kat_stream.config import Config
from kat_stream.curriculum import Groups, Progress, Schedule, number_of
from kat_stream.engines.client import EngineClient
from kat_stream.env.datasets import open_dataset
from kat_stream.errors import DataError, DecodeError, EngineError
from kat_stream.log.base import Delivered, Follower, Writer
from kat_stream.log.message import seal
from kat_stream.mix import check_mix
from kat_stream.service import Context, wait_until
from kat_stream.versions import Versions
from topics import LedgerEntry, PolicyVersion, Record, Reward, RolloutRequest, Sampling, Task

log = logging.getLogger(__name__)

WATCHED = ("policy.versions", "rollout.requests", "rewards", "ledger")
ENGINE_ADOPTS_S = 120.0
"""Longest wait for every engine to run the newest version before an evaluation starts."""


def schedule_of(config: Config, run: str) -> Schedule:
    """The schedule that a configuration describes."""
    section = config.sampler
    sampling = Sampling(
        temperature=section.temperature,
        max_new_tokens=section.max_new_tokens,
        max_turns=section.max_turns,
        max_context=section.max_context,
    )
    return Schedule(
        run=run,
        seed=config.run.seed,
        steps=config.run.steps,
        group_size=section.group_size,
        groups_per_step=section.groups_per_step,
        staleness=section.staleness,
        sampling=sampling,
        eval_before=section.eval_before,
        eval_after=section.eval_after,
        eval_every=section.eval_every,
        eval_tasks=section.eval_tasks,
        mix=check_mix(section.scaffold),
    )


class Sampler:
    versions: Versions
    writer: Writer

    def __init__(self) -> None:
        self.progress = Progress()
        self.changed = anyio.Event()
        self.published_tasks: set[str] = set()

    async def run(self, ctx: Context) -> None:
        config = ctx.config
        schedule = schedule_of(config, ctx.run)
        self.versions = Versions(ctx.run)
        train = await anyio.to_thread.run_sync(_tasks, ctx, config.data.train)
        held_out = await anyio.to_thread.run_sync(_tasks, ctx, config.data.held_out)
        log.info("%d training tasks, %d held-out tasks", len(train), len(held_out))
        name = ctx.group("sampler")
        self.writer = await ctx.log.writer(name, group=name)
        try:
            await self._sample(ctx, schedule, train, held_out)
        finally:
            with anyio.CancelScope(shield=True):
                await self.writer.close()

    async def _sample(self, ctx: Context, schedule: Schedule, train: list[Task], held_out: list[Task]) -> None:
        follower = ctx.log.follow(WATCHED, start="earliest")
        async with follower, anyio.create_task_group() as group:
            async for delivered in follower.catch_up():
                self._read(ctx, delivered)
            group.start_soon(self._watch, ctx, follower)
            while not ctx.stopping.is_set() and not schedule.finished(self.progress):
                changed = self.changed
                if not await self._ask(ctx, schedule, train, held_out):
                    await ctx.unless_stopped(changed.wait())  # there is nothing else to wait for
            group.cancel_scope.cancel()

    async def _watch(self, ctx: Context, follower: Follower) -> None:
        """Keep `progress` equal to what the log says."""
        async for delivered in follower:
            self._read(ctx, delivered)

    def _read(self, ctx: Context, delivered: Delivered) -> None:
        try:
            record = delivered.record()
        except DecodeError as error:
            log.error("passed over: %s", error)
            return
        if record.run == ctx.run:
            self._note(record)
            self.changed.set()
            self.changed = anyio.Event()

    def _note(self, record: Record) -> None:
        progress = self.progress
        match record:
            case PolicyVersion():
                self.versions.take(record)
                progress.version = record.number
                progress.trained = Groups(record.groups_below, record.groups_beyond)
            case RolloutRequest(purpose="eval"):
                progress.eval_asked.setdefault(record.round, set()).add(record.rollout_id)
            case RolloutRequest():
                progress.train_groups = max(progress.train_groups, number_of(record.group_id) + 1)
                telemetry.ADMITTED.set(progress.admitted())
            case Reward(purpose="eval"):
                progress.eval_settled.add(record.rollout_id)
            case LedgerEntry(state="failed" | "cancelled"):
                progress.eval_settled.add(record.rollout_id)

    async def _ask(self, ctx: Context, schedule: Schedule, train: list[Task], held_out: list[Task]) -> bool:
        """Publish what is due now; False if there is nothing, True if something else may be due by now."""
        progress = self.progress
        number = schedule.due_round(progress)
        if number is not None:
            if await self._engines_adopt(ctx):
                between = 0 < number < schedule.steps
                tasks = held_out[: schedule.eval_tasks] if between else held_out
                await self._publish(list(schedule.evaluation(number, tasks, self._deadline(ctx))))
            return True
        if any(schedule.blocks_training(number, progress) for number in progress.eval_asked):
            return False
        if progress.admitted() >= schedule.admissible_groups(progress.version):
            return False
        await self._publish(schedule.group(progress.next_group(), train, self._deadline(ctx)))
        return True

    async def _publish(self, requests: list[RolloutRequest]) -> None:
        """A whole group, or a whole evaluation, in one transaction: half a group would never be packed.

        `FencedError` if another sampler has followed. `LogUnavailable`: a restart reads back whether it was written.
        """
        records: list[Record] = []
        for request in requests:
            if request.task.task_id not in self.published_tasks:
                self.published_tasks.add(request.task.task_id)
                records.append(request.task)
            records.append(request)
            self._note(request)
        await self.writer.commit([seal(record) for record in records], {})

    async def _engines_adopt(self, ctx: Context) -> bool:
        """Wait until every engine samples from the newest version: an evaluation is of one policy.

        False if a newer one was published meanwhile, which engines may adopt at once without ever running this one. It
        cannot go on so for long: while the sampler waits here it asks for no groups, and the trainer runs out of them.
        """
        head = self.versions.head

        def outdated() -> bool:
            return ctx.stopping.is_set() or self.versions.head != head

        async with aiohttp.ClientSession() as session:
            for url in ctx.engine_urls:
                client = EngineClient(url, session)

                async def adopted(client: EngineClient = client) -> bool:
                    try:
                        return outdated() or (await client.info()).weight_version == head
                    except EngineError:
                        return False

                await wait_until(f"engine {url} to run {head}", adopted, deadline_s=ENGINE_ADOPTS_S)
        return not outdated()

    def _deadline(self, ctx: Context) -> float:
        return time.time() + ctx.config.sampler.rollout_timeout_s


def _tasks(ctx: Context, spec: str) -> list[Task]:
    dataset = open_dataset(spec)
    tasks = [msgspec.structs.replace(task, run=ctx.run, scaffold=ctx.config.data.scaffold) for task in dataset.tasks()]
    if not tasks:
        raise DataError(f"{spec}: no tasks")
    return tasks
