"""The stage loops as properties: any order of completion, any crash point, any coming and going of members."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kat_stream.log import Delivered, Emit, MemoryLog, Outcome, run_transform, run_work, transform, work
from tests.contract.log_records import SIZE, GroupJoin, entry, everything, reward, until_written
from tests.unit.stage_kit import opened
from tests.waiting import until
from topics import Reward

COUNT = 12
WAIT_S = 20.0
slow = settings(max_examples=40)
orders = st.permutations(range(COUNT))
crashes = st.lists(st.integers(1, COUNT), max_size=4)


@pytest.fixture(scope="module", autouse=True)
def quick_polls() -> Iterator[None]:
    """A stage notices that it is to stop once per poll."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "POLL_S", 0.01)
        patch.setattr(transform, "POLL_S", 0.01)
        yield


def score_of(delivered: Delivered) -> int:
    record = delivered.record()
    assert isinstance(record, Reward)
    return int(record.score)


class WorkLife:
    """One life of a worker: tasks end in a chosen order; after `crash_after` of them the process is gone."""

    def __init__(self, log: MemoryLog, order: Sequence[int], crash_after: int, finished: set[int]) -> None:
        self.log, self.order, self.crash_after = log, list(order), crash_after
        self.finished, self.before = finished, frozenset(finished)
        self.began: list[int] = []
        self.ended = 0
        self._turn = anyio.Event()
        self.over = anyio.Event()

    async def handle(self, delivered: Delivered) -> Outcome:
        number = score_of(delivered)
        self.began.append(number)
        while self._next() != number:
            await self._turn.wait()
        if self.ended >= self.crash_after:
            self.over.set()
            await anyio.sleep_forever()
        return Emit(entry("g", str(number)))

    def _next(self) -> int:
        return next((n for n in self.order if n not in self.finished), -1)

    def acknowledged(self, number: int) -> None:
        self.finished.add(number)
        self.ended += 1
        turn, self._turn = self._turn, anyio.Event()
        turn.set()
        if len(self.finished) == COUNT:
            self.over.set()

    async def run(self) -> None:
        stopping = anyio.Event()
        how = {"max_in_flight": COUNT, "drain_s": 0.0, "stopping": stopping}
        async with anyio.create_task_group() as following:
            following.start_soon(self._follow)
            async with anyio.create_task_group() as working:
                working.start_soon(
                    lambda: run_work(self.log, ["rewards"], group="w", member="m", handler=self.handle, **how)  # type: ignore[arg-type]
                )
                with anyio.fail_after(WAIT_S):
                    await self.over.wait()
                stopping.set()
            following.cancel_scope.cancel()

    async def _follow(self) -> None:
        async for delivered in self.log.follow(["ledger"]):
            number = int(delivered.record().rollout_id)  # type: ignore[attr-defined]
            if number not in self.finished:
                self.acknowledged(number)


@slow
@given(orders, crashes)
def test_work_loses_nothing_and_repeats_only_what_was_unfinished(order: list[int], crash_points: list[int]) -> None:
    async def scenario() -> None:
        log, finished = await opened(), set[int]()
        await log.publish(*[reward(number) for number in range(COUNT)])
        for crash_after in [*crash_points, COUNT + 1]:
            if len(finished) < COUNT:
                life = WorkLife(log, order, crash_after, finished)
                await life.run()
                assert life.before.isdisjoint(life.began)
                assert len(set(life.began)) == len(life.began)
        assert finished == set(range(COUNT))
        counts = Counter(d.record().rollout_id for d in await everything(log, "ledger"))  # type: ignore[attr-defined]
        assert counts == Counter(str(number) for number in range(COUNT))

    anyio.run(scenario)


GROUPS = 4


@slow
@given(st.permutations(range(GROUPS * SIZE)), st.lists(st.integers(1, GROUPS * SIZE), max_size=5), st.integers(1, 5))
def test_transform_emits_each_group_exactly_once(order: list[int], crash_points: list[int], batch: int) -> None:
    async def scenario() -> None:
        log = await opened()
        await log.publish(*[reward(n, f"g{n % GROUPS}") for n in order])
        for crash_after in [*crash_points, 10**6]:
            left = crash_after

            def dies(record: Reward) -> None:
                nonlocal left
                left -= 1
                if left < 0:
                    raise RuntimeError("the process dies here")

            await transform_life(log, GroupJoin(dies), batch)
        groups = Counter(d.record().group_id for d in await everything(log, "ledger"))  # type: ignore[attr-defined]
        assert groups == Counter(f"g{n}" for n in range(GROUPS))

    anyio.run(scenario)


async def transform_life(log: MemoryLog, handler: GroupJoin, batch: int) -> None:
    """Until every group is written, or the handler dies."""
    stopping = anyio.Event()
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(
                lambda: run_transform(
                    log,
                    ["rewards"],
                    group="t",
                    member="m",
                    handler=handler,
                    stopping=stopping,
                    remember="ledger",
                    batch=batch,
                )
            )
            await until_written(log, "ledger", GROUPS, WAIT_S)
            stopping.set()
    except* RuntimeError:
        pass


steps = st.lists(st.sampled_from(["join", "leave", "publish"]), min_size=3, max_size=10)


@settings(max_examples=20)
@given(steps)
def test_members_come_and_go_in_any_order(plan: list[str]) -> None:
    """Work done is not repeated, groups are written once, whoever owns which partition when."""

    async def scenario() -> None:
        log, worked = await opened(), Counter[int]()
        published = 0

        async def work(delivered: Delivered) -> Outcome:
            await anyio.lowlevel.checkpoint()
            worked[score_of(delivered)] += 1
            return Emit()

        async def member(stop: anyio.Event, name: str) -> None:
            async with anyio.create_task_group() as loops:
                loops.start_soon(
                    lambda: run_work(log, ["rewards"], group="w", member=name, handler=work, stopping=stop)
                )
                loops.start_soon(
                    lambda: run_transform(
                        log,
                        ["rewards"],
                        group="t",
                        member=name,
                        handler=GroupJoin(),
                        stopping=stop,
                        remember="ledger",
                        batch=4,
                    )
                )

        members: list[anyio.Event] = []
        async with anyio.create_task_group() as tasks:
            for number, step in enumerate(["join", *plan, "publish", "join"]):
                if step == "join":
                    members.append(anyio.Event())
                    tasks.start_soon(member, members[-1], f"m{number}")
                elif step == "leave" and len(members) > 1:
                    members.pop(0).set()
                elif step == "publish":
                    await log.publish(*[reward(i, f"g{i // SIZE}") for i in range(published, published + 4 * SIZE)])
                    published += 4 * SIZE
                await anyio.sleep(0.005)  # any time at all: the stages get a little way between the steps
            await until(lambda: len(worked) == published, "all work", WAIT_S)
            await until_written(log, "ledger", published // SIZE, WAIT_S)
            for stop in members:
                stop.set()
        assert worked == Counter(range(published))
        groups = Counter(d.record().group_id for d in await everything(log, "ledger"))  # type: ignore[attr-defined]
        assert groups == Counter(f"g{n}" for n in range(published // SIZE))

    anyio.run(scenario)
