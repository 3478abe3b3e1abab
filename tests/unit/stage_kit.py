"""A member of a stage on the in-memory log whose calls a test steers, for tests of one unlucky order of events each."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from kat_stream.log import (
    Delivered,
    Emit,
    MemoryLog,
    Outcome,
    TopicPartition,
    run_transform,
    run_work,
    transform,
    work,
)
from kat_stream.log.memory_group import MemoryMember
from tests.contract.log_records import (
    WAIT_S,
    entry,
    everything,
    reward,
)
from topics import CATALOGUE, Reward, partition_of

TURNS = 300
"""Of the event loop: many more than anything needs that does not wait."""
PLACE = TopicPartition("rewards", partition_of(reward(0)))


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a fence, or trouble with the log."""
    monkeypatch.setattr(transform, "RETRY_S", 0.001)
    monkeypatch.setattr(transform, "FENCED_PAUSE_S", 0.001)
    monkeypatch.setattr(work, "RETRY_S", 0.001)


async def opened() -> MemoryLog:
    log = MemoryLog()
    await log.apply_topics(CATALOGUE)
    return log


async def turns() -> None:
    for _ in range(TURNS):
        await anyio.lowlevel.checkpoint()


class Steered:
    """One process's way to the log; a test overrides the calls that it wants to steer."""

    def __init__(self, log: MemoryLog) -> None:
        self.log = log
        self.member: MemoryMember | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.log, name)

    async def join(self, topics: Sequence[str], **how: Any) -> Any:
        member = await self.log.join(topics, **how)
        assert isinstance(member, MemoryMember)
        self.member = member
        self.steer(member)
        return member

    def steer(self, member: MemoryMember) -> None:
        """Nothing yet."""


class Worker:
    """Writes an entry for each message; counts."""

    def __init__(self) -> None:
        self.worked: Counter[int] = Counter()

    async def handle(self, delivered: Delivered) -> Outcome:
        record = delivered.record()
        assert isinstance(record, Reward)
        self.worked[int(record.score)] += 1
        return Emit(entry(record.group_id, record.rollout_id))


@asynccontextmanager
async def running_stage(
    stage: Callable[..., Any], log: object, handler: object, **how: Any
) -> AsyncIterator[anyio.Event]:
    """A member of a stage, until the block ends or the yielded event is set."""
    stopping = anyio.Event()
    with anyio.fail_after(2 * WAIT_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(
                lambda: stage(log, ["rewards"], **{"member": "m", **how}, handler=handler, stopping=stopping)
            )
            yield stopping
            stopping.set()


def working(log: object, worker: Worker, **how: Any) -> Any:
    return running_stage(run_work, log, worker.handle, group="w", **how)


def transforming(log: object, handler: object, **how: Any) -> Any:
    return running_stage(run_transform, log, handler, group="t", **how)


async def ledger(log: MemoryLog) -> Counter[str]:
    return Counter(d.record().rollout_id for d in await everything(log, "ledger"))  # type: ignore[attr-defined]


class Each:
    """A transform that writes an entry for each message and knows nothing of what it wrote."""

    def __init__(self, worker: Worker) -> None:
        self.handle = worker.handle

    def assigned(self, partition: int, replay: Sequence[Delivered]) -> None: ...

    def revoked(self, partition: int) -> None: ...
