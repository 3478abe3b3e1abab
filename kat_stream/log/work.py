"""`run_work`: many long tasks at once from few partitions (rollout, verifier).

Invariant: the poll loop never waits for a task. A message is finished only after the records that follow from it are
acknowledged, and finished messages beyond the low-watermark are in the commit's metadata: a restart repeats only what
was unfinished. At-least-once: what follows from a message carries its id, and readers drop what they know.
When partitions move, intake stops, running tasks may finish until the drain deadline, then the place is committed;
tasks of partitions that came back go on, those of lost partitions are cancelled, as the new owner starts them again.
So it is while a stage stops, too: its peers may leave before its last tasks end, and what these did is committed.
A partition of a delay tier rests until its head is due; other stages' messages in it are passed over.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

import anyio
import anyio.abc

from kat_stream.errors import FencedError, LogUnavailable
from kat_stream.log.base import Committed, Delivered, Log, Member, Position, TopicPartition
from kat_stream.log.dead_letter_cap import NORMAL, DeadLetterCap, DeadLetterLimit
from kat_stream.log.handling import MAX_ATTEMPTS, Handling, Settled
from kat_stream.log.outcome import WorkHandler
from kat_stream.log.retries import TIERS, is_for, restored, wait_s
from kat_stream.log.tracker import Tracker

logger = logging.getLogger(__name__)

POLL_S = 0.2
KEEP_ALIVE_S = 30.0
"""Well below Kafka's max.poll.interval: how long a full stage goes without a poll."""
REVOKE_DRAIN_S = 10.0
"""The whole group stands still while partitions are handed over: never longer than this."""
RETRY_S = 1.0
MOVING_S = 0.02
"""How often a loop looks whether partitions have settled."""
LEAVE_S = 8.0


async def run_work(
    log: Log,
    topics: Sequence[str],
    *,
    group: str,
    member: str,
    handler: WorkHandler,
    stopping: anyio.Event,
    max_in_flight: int = 8,
    drain_s: float = 30.0,
    max_attempts: int = MAX_ATTEMPTS,
    dead_letters: DeadLetterLimit = NORMAL,
) -> None:
    """Handle messages until `stopping`, at most `max_in_flight` at once; then drain for `drain_s` and leave the group.

    The delay tiers are read in the same group. Raises what a handler raised if it is neither a DataError nor retriable,
    and TooManyDeadLetters, after logging it: the stage has stopped.
    """
    handling = Handling(group, handler, max_attempts, DeadLetterCap(dead_letters), tiers=True)
    stage = _Work(log, handling, stopping, max_in_flight, drain_s)
    # Together: each member gets its share of every topic, not one the topics and another their empty tiers.
    every = [*topics, *TIERS]
    stage.member = await log.join(every, group=group, member=member, on_revoked=stage.on_revoked, together=True)
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stage.guarded, stage.commit_loop)
            await stage.guarded(stage.take_in, tasks)
            await stage.guarded(stage.drain)
            tasks.cancel_scope.cancel()
    finally:
        with anyio.move_on_after(LEAVE_S, shield=True):
            await stage.leave()
    if stage.crash is not None:
        raise stage.crash


class _Work:
    member: Member

    def __init__(self, log: Log, handling: Handling, stopping: anyio.Event, max_in_flight: int, drain_s: float) -> None:
        self.crash: Exception | None = None
        self.running: dict[Position, anyio.CancelScope] = {}
        self._log = log
        self._handling = handling
        self._stopping = stopping
        self._max_in_flight = max_in_flight
        self._drain_s = drain_s
        self._trackers: dict[TopicPartition, Tracker] = {}
        self._committed: dict[TopicPartition, Committed] = {}
        self._resting: dict[TopicPartition, float] = {}
        """Partitions of tiers, and when (monotonic) their head is due."""
        self._rested: dict[TopicPartition, int] = {}
        """Which head rested last: it is due now, also if a clock that was set back says that it is not."""
        self._epoch = -1
        self._changed = anyio.Event()
        self._uncommitted = False
        self._commit_lock = anyio.Lock()

    async def guarded(self, step: Callable[..., Awaitable[None]], *args: object) -> None:
        """Run a step; its error stops the stage as one exception, not as a group of them."""
        try:
            await step(*args)
        except Exception as error:  # whatever it is, the stage stops with it: run_work raises it again
            logger.exception("%s: stops", self._handling.stage)
            self.crash = self.crash or error
            self._notify()

    async def take_in(self, tasks: anyio.abc.TaskGroup) -> None:
        """Poll and start tasks until the stage stops or breaks."""
        while not self._stopping.is_set() and self.crash is None:
            await self._patiently(self._step, tasks)

    async def drain(self) -> None:
        """Start nothing more, and wait at most `drain_s` until the tasks ended and what they did can be committed."""
        with anyio.move_on_after(self._drain_s):
            while self.crash is None and (self.running or (self._epoch != self.member.epoch and self._news())):
                await self._patiently(self._keep_places)

    async def _patiently(self, step: Callable[..., Awaitable[None]], *args: object) -> None:
        """Run a step; what is the log's fault is over after a pause."""
        try:
            await step(*args)
        except (LogUnavailable, FencedError) as error:
            logger.warning("%s: waiting for the log: %s", self._handling.stage, error)
            await anyio.sleep(RETRY_S)

    async def _keep_places(self) -> None:
        """Take over partitions that moved, or wait for a change."""
        if self._epoch != self.member.epoch:
            await self._reassign()
        else:
            with anyio.move_on_after(MOVING_S):
                await self._changed.wait()

    async def _step(self, tasks: anyio.abc.TaskGroup) -> None:
        """One turn of the loop: take over partitions, or wait for a slot, or poll."""
        free = self._max_in_flight - len(self.running)
        if self._epoch != self.member.epoch:
            await self._reassign()
        elif free <= 0:
            await self._wait_for_a_slot()
        else:
            self._wake()
            batch = await self.member.poll(limit=free, timeout_s=POLL_S)
            for delivered in batch:
                self._start(tasks, delivered)
            if not batch:
                await self._skip_markers()

    async def drained(self, positions: Iterable[Position], within_s: float) -> None:
        """Wait until these tasks ended, at most `within_s`."""
        waiting = set(positions)
        with anyio.move_on_after(within_s):
            while self.crash is None and not waiting.isdisjoint(self.running):
                await self._changed.wait()

    async def on_revoked(self, partitions: frozenset[TopicPartition]) -> None:
        """Partitions are about to move: let tasks end, say what is done."""
        if self.crash is None and not self._stopping.is_set():
            tasks = [position for position in self.running if position.topic_partition in partitions]
            await self.drained(tasks, min(self._drain_s, REVOKE_DRAIN_S))
        await self._commit()

    async def commit_loop(self) -> None:
        """Commit as soon as something finished; finishes during a commit share the next one."""
        while True:
            while not self._uncommitted:
                await self._changed.wait()
            self._uncommitted = False
            if self._epoch == self.member.epoch and not await self._commit():
                await anyio.sleep(RETRY_S)
                self._uncommitted = True

    async def leave(self) -> None:
        if self._epoch == self.member.epoch:
            await self._commit()
        await self.member.leave()

    async def _wait_for_a_slot(self) -> None:
        with anyio.move_on_after(KEEP_ALIVE_S) as idle:
            while (
                len(self.running) >= self._max_in_flight
                and self._epoch == self.member.epoch
                and not self._stopping.is_set()
            ):
                with anyio.move_on_after(POLL_S):
                    await self._changed.wait()
        if idle.cancelled_caught:
            await self.member.keep_alive()

    async def _reassign(self) -> None:
        """Keep trackers that nobody touched meanwhile, load the others, cancel what was lost."""
        epoch, mine = self.member.epoch, self.member.assigned
        if mine is None:
            await anyio.sleep(MOVING_S)
            return
        stored = await self._log.commits(self._handling.stage)
        kept = {p for p in mine & self._trackers.keys() if stored.get(p, Committed(0)) == self._committed[p]}
        for partition in self._trackers.keys() - kept:
            self._drop(partition)
        for partition, start in (await readable_from(self._log, mine - kept, stored)).items():
            self._trackers[partition] = Tracker(start)
            self._committed[partition] = stored.get(partition, Committed(0))
        if self.member.epoch != epoch:
            return
        for partition in mine:
            self.member.seek(partition, self._trackers[partition].position)
        self._resting.clear()
        self._rested.clear()
        self._epoch = epoch
        self._notify()

    def _wake(self) -> None:
        now = time.monotonic()
        for partition in [partition for partition, until in self._resting.items() if until <= now]:
            del self._resting[partition]
            self.member.resume(partition)

    def _rest(self, position: Position, seconds: float) -> None:
        """Its head is not due: read it again then."""
        partition = position.topic_partition
        self._rested[partition] = position.offset
        self._resting[partition] = time.monotonic() + seconds
        self.member.seek(partition, position.offset)
        self.member.pause(partition)

    def _drop(self, partition: TopicPartition) -> None:
        del self._trackers[partition], self._committed[partition]
        for position, scope in self.running.items():
            if position.topic_partition == partition:
                scope.cancel()

    def _start(self, tasks: anyio.abc.TaskGroup, delivered: Delivered) -> None:
        position = delivered.position
        tracker = self._trackers.get(position.topic_partition)
        if tracker is None or position.topic_partition in self._resting:
            return
        early_s = wait_s(delivered, self._handling.stage)
        if early_s > 0 and self._rested.get(position.topic_partition) != position.offset:
            self._rest(position, early_s)
        elif not tracker.take(position.offset):  # finished in an earlier life: the place may move over it
            self._notify()
        elif is_for(delivered, self._handling.stage):
            self.running[position] = anyio.CancelScope()
            tasks.start_soon(self._run, position, restored(delivered), tracker)
        else:
            tracker.finish(position.offset)
            self._notify()

    async def _run(self, position: Position, delivered: Delivered, tracker: Tracker) -> None:
        scope = self.running[position]
        try:
            with scope:
                settled = await self._handling.settle(delivered)
                if not isinstance(settled, Settled) or settled.done:
                    raise TypeError(f"a work handler finishes its own message and no other, not {settled!r}")
                await self._publish(settled)
                tracker.finish(position.offset)
        except Exception as error:  # whatever it is, the stage stops with it: run_work raises it again
            logger.exception("%s: stops at %s", self._handling.stage, position)
            self.crash = self.crash or error
        finally:
            if self.running.get(position) is scope:
                del self.running[position]
            self._notify()

    async def _publish(self, settled: Settled) -> None:
        """Until it is acknowledged: the work is done and only the broker is missing."""
        waiting = settled.messages
        while waiting:
            try:
                await self._log.append(*waiting)
                waiting = ()
            except LogUnavailable as error:
                logger.warning("%s: still publishing: %s", self._handling.stage, error)
                await anyio.sleep(RETRY_S)

    async def _commit(self) -> bool:
        """Commit every place that changed; False if the broker did not answer."""
        async with self._commit_lock:
            new = self._news()
            if not new:
                return True
            try:
                await self.member.commit(new)
            except FencedError as error:
                logger.info("%s: not committed, partitions move: %s", self._handling.stage, error)
                return True
            except LogUnavailable as error:
                logger.warning("%s: not committed yet: %s", self._handling.stage, error)
                return False
            self._committed.update({p: place for p, place in new.items() if p in self._committed})
            return True

    def _news(self) -> dict[TopicPartition, Committed]:
        """Places that are not committed yet as they are now."""
        places = {partition: tracker.commit() for partition, tracker in self._trackers.items()}
        return {p: place for p, place in places.items() if place != self._committed[p]}

    async def _skip_markers(self) -> None:
        """With nothing open, the place to commit is where the reader stands: markers are not lag.

        Not once partitions move: the reader then stands beyond messages that the poll threw away.
        """
        for partition, tracker in list(self._trackers.items()):
            position = await self.member.position(partition)
            if self._epoch != self.member.epoch:
                return
            if position is not None and not tracker.open and position > tracker.position:
                tracker.advance(position)
                self._notify()

    def _notify(self) -> None:
        """Wake who waits for a change; each then looks for itself."""
        self._uncommitted = True
        changed, self._changed = self._changed, anyio.Event()
        changed.set()


async def readable_from(
    log: Log, partitions: Iterable[TopicPartition], stored: Mapping[TopicPartition, Committed]
) -> dict[TopicPartition, Committed]:
    """Where a group reads on; what retention removed unread is reported, not passed over in silence."""
    wanted = list(partitions)
    begins = {topic: await log.beginning_offsets(topic) for topic in {partition.topic for partition in wanted}}
    starts = {}
    for partition in wanted:
        begin = begins[partition.topic][partition.partition]
        starts[partition] = stored.get(partition, Committed(begin))
        if starts[partition].offset < begin:
            logger.error("%s[%d]: %d messages expired unread", *partition, begin - starts[partition].offset)
            starts[partition] = Committed(begin)
    return starts
