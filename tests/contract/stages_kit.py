"""The stage loops on either log, each running beside a test: until its block ends, or until it is stopped."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import anyio

from kat_stream.log import Committed, Delivered, Log, Outcome, TransformHandler, run_transform, run_work
from kat_stream.log.transform import Mine
from tests.contract.log_records import everything, nothing
from topics import Reward


class Stopping:
    """A stage running beside the test; `stop` ends it and returns when it has left."""

    def __init__(self) -> None:
        self.event = anyio.Event()
        self.ended = anyio.Event()

    async def stop(self, within_s: float = 20.0) -> None:
        self.event.set()
        with anyio.fail_after(within_s):
            await self.ended.wait()


@asynccontextmanager
async def working(
    log: Log, handler: Callable[[Delivered], Awaitable[Outcome]], **options: object
) -> AsyncIterator[Stopping]:
    """One member of group `w` on `rewards`, stopped at the end of the block."""
    settings: dict[str, object] = {"max_in_flight": 8, "drain_s": 5.0, "member": "m", **options}
    running = Stopping()

    async def run() -> None:
        try:
            await run_work(log, ["rewards"], group="w", handler=handler, stopping=running.event, **settings)  # type: ignore[arg-type]
        finally:
            running.ended.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        yield running
        await running.stop()


def scored(delivered: Delivered) -> int:
    record = delivered.record()
    assert isinstance(record, Reward)
    return int(record.score)


@asynccontextmanager
async def transforming(
    log: Log, handler: TransformHandler, member: str = "m", batch: int = 100, mine: Mine = lambda delivered: True
) -> AsyncIterator[None]:
    stopping = anyio.Event()

    async def run() -> None:
        await run_transform(
            log,
            ["rewards"],
            group="t",
            member=member,
            handler=handler,
            stopping=stopping,
            remember="ledger",
            mine=mine,
            batch=batch,
        )

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        yield
        stopping.set()


async def emitted(log: Log) -> Counter[str]:
    return Counter(d.record().group_id for d in await everything(log, "ledger"))  # type: ignore[attr-defined]


async def reset(log: Log, group: str, *topics: str) -> None:
    """As `kafka-consumer-groups --reset-offsets --to-earliest` does while the stage is down: metadata goes, too."""

    member = await log.join(topics, group=group, member="operator", on_revoked=nothing)
    with anyio.fail_after(60):
        while not member.assigned:
            await member.poll(limit=1, timeout_s=0.05)
    await member.commit({place: Committed(0) for place in member.assigned})
    await member.leave()
