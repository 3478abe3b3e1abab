"""`run_transform`: consume-transform-produce, one transaction a batch and partition number (packer, results, archiver).

Invariant: what follows from a message and the fact that it is finished become visible together or not at all. Each
partition number has one writer with the stable id `{group}.{first topic}.{partition}`; it is opened before the
committed place is read, so an owner that lost the partition can neither write nor move the place back (its writer is
fenced), and nothing that it did write is overlooked.
Messages finish out of order: the committed offset is the low-watermark of held ones, and what is finished beyond it is
in the commit's metadata. Lanes of partitions that come back after a rebalance go on with their state.
What the stage wrote is read back whole, so that an input that is repeated ever so late, or read again because somebody
moved the group's places, is known. Only the beginning is left out: the commit's metadata says where the first output
lies, in the same transaction; places without it (moved, expired) mean the beginning of the topic.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

import anyio

from kat_stream.errors import DeadlineExceeded, FencedError, LogUnavailable
from kat_stream.log.base import Committed, Delivered, Log, Member, Message, Position, TopicPartition, Writer
from kat_stream.log.dead_letter_cap import NORMAL, DeadLetterCap, DeadLetterLimit
from kat_stream.log.handling import MAX_ATTEMPTS, Handling, Settled, sealed
from kat_stream.log.outcome import Emit, TransformHandler
from kat_stream.log.tracker import Tracker, output_of, with_output
from kat_stream.log.work import LEAVE_S, MOVING_S, POLL_S, RETRY_S, REVOKE_DRAIN_S, readable_from

logger = logging.getLogger(__name__)

Mine = Callable[[Delivered], bool]
"""Whether this stage wrote a message of the topic that it reads back: runs share topics."""
Late = Callable[[int], Emit | None]
"""Asked for a partition number after each batch, empty ones too: what a handler does because time has passed."""

REPLAY_S = 900.0
"""How long reading back the stage's own output may take when partitions are taken over."""
DECIDED_S = 120.0
"""Longer than a broker keeps a transaction open whose writer died."""
FENCED_PAUSE_S = 2.0
"""Longer than a heartbeat: a member that was fenced learns first whether it still owns the partition."""


async def run_transform(
    log: Log,
    topics: Sequence[str],
    *,
    group: str,
    member: str,
    handler: TransformHandler,
    stopping: anyio.Event,
    remember: str | None = None,
    mine: Mine = lambda delivered: True,
    batch: int = 100,
    max_attempts: int = MAX_ATTEMPTS,
    dead_letters: DeadLetterLimit = NORMAL,
    late: Late | None = None,
) -> None:
    """Handle messages until `stopping`. Topics are joined by partition number, so a handler sees whole groups.

    `remember`: a topic of small records that only this kind of stage writes, of the same partition count. All that is
    `mine` of a partition is given to `handler.assigned`, so that it knows what it wrote.
    `late`: finishes held messages whose time is up, in the transaction of the batch.
    `batch`: messages a transaction, at most. Retries wait in place: a group's messages stay in order.
    Raises what the handler raised if it is neither a DataError nor retriable, and TooManyDeadLetters; nothing of that
    batch is visible.
    """
    handling = Handling(group, handler.handle, max_attempts, DeadLetterCap(dead_letters), tiers=False)
    output = _Output(log, remember, mine) if remember is not None else None
    stage = _Transform(log, topics, handling, handler, output, late)
    stage.member = await log.join(topics, group=group, member=member, on_revoked=stage.on_revoked, together=True)
    try:
        while not stopping.is_set():
            try:
                await stage.step(batch)
            except (LogUnavailable, FencedError, DeadlineExceeded) as error:
                logger.warning("%s: waiting for the log: %s", group, error)
                await anyio.sleep(RETRY_S)
    except Exception:  # whatever it is, the stage stops with it
        logger.exception("%s: stops", group)
        raise
    finally:
        with anyio.move_on_after(LEAVE_S, shield=True):
            await stage.leave()


class _Lane:
    """One partition number: its writer and what is open in each topic."""

    def __init__(
        self,
        partition: int,
        writer: Writer,
        starts: Mapping[TopicPartition, Committed],
        output_from: int | None,
    ) -> None:
        """`output_from`: where the stage's own output begins, if it has one."""
        self.partition = partition
        self.trackers = {p: Tracker(start) for p, start in starts.items()}
        self._writer = writer
        self._committed = dict(starts)
        self._output_from = output_from

    async def process(self, batch: Iterable[Delivered], handling: Handling, late: Late | None) -> None:
        """Handle a batch in order, then make it visible. FencedError and LogUnavailable end the lane."""
        messages: list[Message] = []
        for delivered in batch:
            position = delivered.position
            if self.trackers[position.topic_partition].take(position.offset):
                settled = await handling.settle(delivered)
                if isinstance(settled, Settled):
                    messages += settled.messages
                    self._finish({position, *settled.done})
        if late is not None and (overdue := late(self.partition)) is not None:
            messages += sealed(overdue).messages
            self._finish(set(overdue.done))
        await self._commit(messages)

    async def close(self) -> None:
        await self._writer.close()

    def _finish(self, positions: set[Position]) -> None:
        for position in positions:
            self.trackers[position.topic_partition].finish(position.offset)

    async def _commit(self, messages: Sequence[Message]) -> None:
        places = {p: tracker.commit() for p, tracker in self.trackers.items()}
        if self._output_from is not None:
            places = {p: with_output(place, self._output_from) for p, place in places.items()}
        new = {p: place for p, place in places.items() if place != self._committed[p]}
        if messages or new:
            await self._writer.commit(messages, new)
            self._committed.update(new)


@dataclass(frozen=True, slots=True)
class _Output:
    """The stage's own topic, from where it is read back."""

    log: Log
    topic: str
    mine: Mine

    async def read_back(self, froms: Mapping[int, int]) -> dict[int, _Written]:
        """What the stage wrote to each partition number from these offsets on."""
        await self._decided(froms.keys())
        begins = await self.log.beginning_offsets(self.topic)
        start = {(self.topic, number): max(offset, begins[number]) for number, offset in froms.items()}
        mine: dict[int, list[Delivered]] = {number: [] for number in froms}
        async with self.log.follow([self.topic], start=start, partitions=list(froms)) as follower:
            async for delivered in follower.catch_up(REPLAY_S):
                if self.mine(delivered):
                    mine[delivered.position.partition].append(delivered)
            ends = follower.position()
        return {
            number: _Written(found[0].position.offset if found else ends[TopicPartition(self.topic, number)], found)
            for number, found in mine.items()
        }

    async def _decided(self, numbers: Collection[int]) -> None:
        """Until all that was written can be read: an open transaction, of another run say, hides what came after it."""
        written, give_up = await self.log.high_watermarks(self.topic), time.monotonic() + DECIDED_S
        while True:
            readable = await self.log.end_offsets(self.topic)
            if all(readable[number] >= written[number] for number in numbers):
                return
            if time.monotonic() > give_up:
                raise DeadlineExceeded(f"transactions on {self.topic} to be decided", DECIDED_S)
            await anyio.sleep(RETRY_S)


@dataclass(frozen=True, slots=True)
class _Written:
    """The stage's output in one partition; whatever it writes from now on lies at `start` or beyond it."""

    start: int
    messages: Sequence[Delivered]


class _Transform:
    member: Member

    def __init__(
        self,
        log: Log,
        topics: Sequence[str],
        handling: Handling,
        handler: TransformHandler,
        output: _Output | None,
        late: Late | None,
    ) -> None:
        self._log = log
        self._topics = topics
        self._handling = handling
        self._handler = handler
        self._output = output
        self._late = late
        self._lanes: dict[int, _Lane] = {}
        self._epoch = -1
        self._busy = anyio.Lock()
        """Held while a batch is handled: partitions do not move under it."""

    async def step(self, limit: int) -> None:
        """One turn of the loop: take over partitions, poll, process."""
        if self._epoch != self.member.epoch:
            await self._reassign()
            return
        batch = await self.member.poll(limit=limit, timeout_s=POLL_S)
        lanes: dict[int, list[Delivered]] = {}
        for delivered in batch:
            lanes.setdefault(delivered.position.partition, []).append(delivered)
        if not batch:
            lanes = {partition: [] for partition in await self._skip_markers()}
        if self._late is not None:
            lanes = {partition: [] for partition in self._lanes} | lanes
        if lanes:
            await self._process(lanes)

    async def on_revoked(self, partitions: frozenset[TopicPartition]) -> None:
        """Partitions are about to move: let the running batch end. If it takes too long its writer will be fenced."""
        with anyio.move_on_after(REVOKE_DRAIN_S):
            async with self._busy:
                logger.debug("%s: hands over %d partitions", self._handling.stage, len(partitions))

    async def leave(self) -> None:
        for partition in list(self._lanes):
            await self._drop(partition)
        await self.member.leave()

    async def _process(self, batches: dict[int, list[Delivered]]) -> None:
        async with self._busy:
            for partition, batch in batches.items():
                if partition in self._lanes:
                    await self._process_one(self._lanes[partition], batch)

    async def _process_one(self, lane: _Lane, batch: list[Delivered]) -> None:
        try:
            await lane.process(batch, self._handling, self._late)
        except (FencedError, LogUnavailable) as error:
            logger.warning("%s: partition %d is opened anew: %s", self._handling.stage, lane.partition, error)
            await self._drop(lane.partition)
            self._epoch = -1
            await anyio.sleep(FENCED_PAUSE_S if isinstance(error, FencedError) else RETRY_S)

    async def _drop(self, partition: int) -> None:
        lane = self._lanes.pop(partition)
        self._handler.revoked(partition)
        await lane.close()

    async def _reassign(self) -> None:
        epoch, mine = self.member.epoch, self.member.assigned
        if mine is None:
            await anyio.sleep(MOVING_S)
            return
        numbers = {partition.partition for partition in mine}
        for lost in self._lanes.keys() - numbers:
            await self._drop(lost)
        await self._open(mine, sorted(numbers - self._lanes.keys()))
        if self.member.epoch != epoch:
            return
        for lane in self._lanes.values():
            for partition, tracker in lane.trackers.items():
                self.member.seek(partition, tracker.position)
        self._epoch = epoch

    async def _open(self, mine: frozenset[TopicPartition], numbers: Sequence[int]) -> None:
        """Fence earlier owners, then read the place, then what was written: in this order nothing is overlooked."""
        async with AsyncExitStack() as opened:
            writers = {number: await self._open_writer(number, opened) for number in numbers}
            stored = await self._log.commits(self._handling.stage)
            starts = await readable_from(self._log, [p for p in mine if p.partition in writers], stored)
            lanes = {n: {p: start for p, start in starts.items() if p.partition == n} for n in numbers}
            froms = {n: min(map(output_of, lane.values()), default=0) for n, lane in lanes.items()}
            written = await self._output.read_back(froms) if self._output is not None and froms else {}
            for number, writer in writers.items():
                before = written.get(number)
                self._handler.assigned(number, before.messages if before else ())
                self._lanes[number] = _Lane(number, writer, lanes[number], before.start if before else None)
            opened.pop_all()

    async def _open_writer(self, number: int, opened: AsyncExitStack) -> Writer:
        group = self._handling.stage
        writer = await self._log.writer(f"{group}.{self._topics[0]}.{number}", group=group)
        opened.push_async_callback(writer.close)
        return writer

    async def _skip_markers(self) -> list[int]:
        """Partition numbers where the reader stands beyond what is recorded: transaction markers are not lag.

        Not once partitions move: the reader then stands beyond messages that the poll threw away.
        """
        moved: list[int] = []
        for number, lane in self._lanes.items():
            for partition, tracker in lane.trackers.items():
                position = await self.member.position(partition)
                if self._epoch != self.member.epoch:
                    return moved
                if position is not None and position > tracker.position:
                    tracker.advance(position)
                    moved += [] if tracker.open else [number]
        return moved
