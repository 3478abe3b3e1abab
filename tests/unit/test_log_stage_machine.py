"""Members of both stages that come, go, crash and are fenced, in any order: nothing is lost, no group comes twice.

A crash: after so many more calls nothing that the process says reaches the log, and its membership ends. A fence: its
membership ends, but it works on (a zombie: SIGSTOP for longer than a session) until it is stopped.

Mutations that this machine was seen to catch: a transform forgets what it wrote (since groups come again), no fencing
by the writer's id. Commits past unfinished work and lost metadata fall to test_log_tracker.py; what needs one unlucky
order of events, as a message that is finished before it is published, to test_log_{work,transform}_orders.py.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import anyio
import anyio.lowlevel
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kat_stream.errors import LogUnavailable
from kat_stream.log import (
    Committed,
    Delivered,
    Emit,
    MemoryLog,
    Message,
    Outcome,
    TopicPartition,
    run_transform,
    run_work,
)
from kat_stream.log.memory_group import MemoryMember, MemoryWriter
from tests.contract.log_records import SIZE, GroupJoin, everything, reward, until_committed, until_written
from tests.waiting import until
from topics import CATALOGUE, Reward, Score

WAIT_S = 120.0
TURN_S = 0.004
"""How long the stages run between two rules."""
TURNS = 400
"""Of the event loop, in which a process that is to crash makes its last calls."""
ZOMBIE_S = 0.5
"""How long zombies may go on reading at the end; one that waits for a partition that it lost reads no more."""
pick = st.integers(0, 99)


class Process:
    """One process's connection to the log; when it is cut, nothing that is sent arrives."""

    def __init__(self, log: MemoryLog, name: str) -> None:
        self.log, self.dice = log, random.Random(name)
        self.left: int | None = None
        """Calls until it is cut off, once that is decided."""
        self.members: list[MemoryMember] = []
        self.writers = 0

    @property
    def works(self) -> bool:
        """Both stages are in their groups, and the transform has opened its partitions."""
        return len(self.members) == 2 and self.writers >= max(1, min(len(member.owned) for member in self.members))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.log, name)

    @property
    def has_unread(self) -> bool:
        return any(self.log.readable(member._active()) for member in self.members)

    @property
    def cut(self) -> bool:
        return self.left is not None and self.left <= 0

    async def others(self) -> None:
        """Others have turns, few or many."""
        for _ in range(self.dice.choice((1, 1, 2, 20))):
            await anyio.lowlevel.checkpoint()

    async def call(self) -> None:
        """Before each call that writes: later calls overtake it, and it may never arrive."""
        await self.others()
        if self.cut:
            raise LogUnavailable("the process is gone")
        if self.left is not None:
            self.left -= 1

    async def append(self, *messages: Message, deadline_s: float = 30.0) -> None:
        await self.call()
        await self.log.append(*messages, deadline_s=deadline_s)

    async def join(self, topics: Sequence[str], **how: Any) -> Any:
        member = await self.log.join(topics, **how)
        assert isinstance(member, MemoryMember)
        self.members.append(member)
        commit = member.commit

        async def guarded(commits: Mapping[TopicPartition, Committed]) -> None:
            await self.call()
            await commit(commits)

        member.commit = guarded  # type: ignore[method-assign]
        return member

    async def writer(self, writer_id: str, *, group: str) -> Any:
        await self.others()
        writer = await self.log.writer(writer_id, group=group)
        assert isinstance(writer, MemoryWriter)
        commit = writer.commit
        self.writers += 1

        async def guarded(messages: Sequence[Message], commits: Mapping[TopicPartition, Committed]) -> None:
            await self.call()
            await commit(messages, commits)

        writer.commit = guarded  # type: ignore[method-assign]
        return writer

    async def evict(self) -> None:
        for member in self.members:
            await member.leave()


def done(record: Reward) -> Score:
    """What the worker writes for a message."""
    group, rollout = record.group_id, record.rollout_id
    return Score(
        run="r", group_id=group, rollout_id=rollout, scorer="w", version="", turn_ids=(), repeats=0, logprobs=b""
    )


class Life:
    """One process with a member of each stage."""

    def __init__(self, log: MemoryLog, name: str, worked: Counter[int]) -> None:
        self.process, self.stopping = Process(log, name), anyio.Event()
        self.scope = anyio.CancelScope()
        self._name, self._worked = name, worked
        self.task = asyncio.ensure_future(self._run())

    async def _work(self, delivered: Delivered) -> Outcome:
        record = delivered.record()
        assert isinstance(record, Reward)
        self._worked[int(record.score)] += 1
        for _ in range(1 + int(record.score) % 7):
            await anyio.lowlevel.checkpoint()
        return Emit(done(record))

    async def _run(self) -> None:
        how: dict[str, Any] = {"member": self._name, "stopping": self.stopping}
        log: Any = self.process
        with self.scope:
            async with anyio.create_task_group() as loops:
                loops.start_soon(
                    lambda: run_work(log, ["rewards"], group="w", handler=self._work, drain_s=WAIT_S, **how)
                )
                loops.start_soon(
                    lambda: run_transform(
                        log, ["rewards"], group="t", handler=GroupJoin(), remember="ledger", batch=4, **how
                    )
                )

    async def leave(self) -> None:
        self.stopping.set()
        with anyio.fail_after(WAIT_S):
            await self.task

    async def crash(self, after: int) -> None:
        """Once it has made so many more calls; sooner if it has nothing to say."""
        self.process.left = after
        for _ in range(TURNS):
            if self.process.cut:
                break
            await anyio.lowlevel.checkpoint()
        self.process.left = 0
        self.scope.cancel()
        with anyio.fail_after(WAIT_S):
            await self.task
        await self.process.evict()


class Stages(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.Runner()
        self.log = MemoryLog()
        self.worked: Counter[int] = Counter()
        self.lives: list[Life] = []
        self.zombies: list[Life] = []
        self.number, self.published, self.unclean = 0, 0, False
        self.sent: Counter[int] = Counter()
        """How often each message was published."""
        self.places: dict[TopicPartition, int] = {}
        self.loop.run(self.log.apply_topics(CATALOGUE))

    @rule(groups=st.integers(1, 4), seed=st.randoms(use_true_random=False))
    def publish(self, groups: int, seed: Any) -> None:
        scores = list(range(self.published, self.published + groups * SIZE))
        self.published += len(scores)
        seed.shuffle(scores)
        self.loop.run(self._send(scores))

    @precondition(lambda self: self.published)
    @rule(which=pick)
    def repeat(self, which: int) -> None:
        """A whole group comes again, however late."""
        first = which % (self.published // SIZE) * SIZE
        self.loop.run(self._send(range(first, first + SIZE)))

    async def _send(self, scores: Sequence[int]) -> None:
        self.sent.update(scores)
        await self.log.publish(*[reward(score, f"g{score // SIZE}") for score in scores])

    @precondition(lambda self: len(self.lives) < 4)
    @rule()
    def join(self) -> None:
        self.number += 1
        self.loop.run(self._join())

    async def _join(self) -> None:
        self.lives.append(Life(self.log, f"m{self.number}", self.worked))
        await until(lambda: self.lives[-1].process.works, "a life that works", WAIT_S)

    @precondition(lambda self: self.lives)
    @rule(which=pick, how=st.sampled_from(["leaves", "crashes", "is fenced"]), after=st.integers(0, 12))
    def end(self, which: int, how: str, after: int) -> None:
        life = self.lives.pop(which % len(self.lives))
        self.unclean |= how != "leaves"
        match how:
            case "leaves":
                self.loop.run(life.leave())
            case "crashes":
                self.loop.run(self._crash(life, after))
            case "is fenced":
                self.zombies.append(life)
                self.loop.run(life.process.evict())

    async def _crash(self, life: Life, after: int) -> None:
        """In the middle of work: of two new groups."""
        new = range(self.published, self.published + 2 * SIZE)
        self.published = new.stop
        await self._send(new)
        await life.crash(after)

    @rule()
    def time_passes(self) -> None:
        self.loop.run(anyio.sleep(TURN_S))

    @invariant()
    def no_group_comes_twice(self) -> None:
        assert max(self.loop.run(self._groups()).values(), default=0) <= 1

    @invariant()
    def no_place_moves_back(self) -> None:
        for group in "tw":
            for partition, offset in self.loop.run(self.log.committed(group)).items():
                assert offset >= self.places.get(TopicPartition(group, partition.partition), 0)
                self.places[TopicPartition(group, partition.partition)] = offset

    async def _outputs(self) -> Counter[str]:
        """Of the worker, by rollout."""
        return Counter(d.record().rollout_id for d in await everything(self.log, "scores"))  # type: ignore[attr-defined]

    async def _all_put_out(self) -> bool:
        """Whether the worker has written at least once for each message."""
        outputs = await self._outputs()
        return all(outputs[f"g{score // SIZE}-{score}"] >= times for score, times in self.sent.items())

    async def _groups(self) -> Counter[str]:
        return Counter(d.record().group_id for d in await everything(self.log, "ledger"))  # type: ignore[attr-defined]

    async def _finish(self) -> None:
        """Whatever went before: one more member does what is left and what still comes, while zombies work on.

        At the end every group comes again.
        """
        self.number += 1
        await self._join()
        more = range(self.published, self.published + 24 * SIZE)
        self.published = more.stop
        await self._send(more)
        await until_written(self.log, "ledger", self.published // SIZE, WAIT_S)
        await self._send(range(self.published))
        await until(self._all_put_out, "all outputs", WAIT_S)
        await until_committed(self.log, "t", "rewards")
        with anyio.move_on_after(ZOMBIE_S):
            await until(lambda: not any(life.process.has_unread for life in self.zombies))
        for life in [*self.zombies, *self.lives]:
            await life.leave()

    def teardown(self) -> None:
        try:
            self.loop.run(self._finish())
            assert self.loop.run(self._groups()) == Counter(f"g{n}" for n in range(self.published // SIZE))
            self.no_place_moves_back()
            if not self.unclean:
                assert self.worked == self.sent
                assert self.loop.run(self._outputs()).total() == self.sent.total()
        finally:
            self.loop.close()


TestStages = Stages.TestCase
TestStages.settings = settings(max_examples=15, stateful_step_count=15)
