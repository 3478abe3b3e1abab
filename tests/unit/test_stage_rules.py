"""What single stages decide on single messages: rules that no story would miss at once if they were gone."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from consumers import archiver
from consumers.rollout import RolloutHandler, _from
from consumers.verifier import ATTEMPTS, VerifierHandler
from kat_stream.archive import ArchiveWriter, read_archive
from kat_stream.config import load
from kat_stream.errors import StorageError
from kat_stream.log import Delivered, Emit, MemoryLog, Outcome, Position, Retry
from kat_stream.log.message import seal
from kat_stream.log.retries import numbered
from kat_stream.service import Context
from producers.sampler import Sampler
from tests.contract.log_records import everything, until_written
from tests.observe_kit import RUN, entry, request, reward, trajectory
from tests.waiting import until
from topics import CATALOGUE, PolicyVersion, Record, Reward, RolloutRequest, Task, Trajectory

pytestmark = pytest.mark.anyio
ASKED = request("g", 0, 1)


def delivered(record: Record, attempt: int = 1) -> Delivered:
    message = seal(record)
    return numbered(Delivered(Position(message.topic, 0, 0), message.key, message.value, message.headers, 0), attempt)


class Says:
    """A grader, or a runner of agents, that has its answer ready; `asked` counts."""

    def __init__(self, answer: Any) -> None:
        self.answer, self.asked = answer, 0

    async def grade(self, _: Trajectory) -> Reward:
        self.asked += 1
        assert isinstance(self.answer, Reward)
        return self.answer

    async def run_graded(self, _: RolloutRequest, attempt: int = 1) -> Any:
        self.asked += 1
        return self.answer


def written(outcome: Outcome) -> list[Record]:
    assert isinstance(outcome, Emit)
    return list(outcome.records)


async def verified(one: Trajectory, says: Reward, attempt: int = 1) -> tuple[Outcome, int]:
    grader: Any = Says(says)
    return await VerifierHandler(RUN, grader)(delivered(one, attempt)), grader.asked


def in_place(asked: RolloutRequest) -> RolloutRequest:
    verifier = msgspec.structs.replace(asked.task.verifier, in_place=True)
    return msgspec.structs.replace(asked, task=msgspec.structs.replace(asked.task, verifier=verifier))


@pytest.mark.parametrize(
    "one",
    [
        trajectory(in_place(ASKED)),
        trajectory(ASKED, "infra_error"),
        trajectory(msgspec.structs.replace(ASKED, run="x")),
    ],
    ids=["graded in place", "not gradable", "of another run"],
)
async def test_what_is_not_the_verifiers_is_not_graded(one: Trajectory) -> None:
    outcome, asked = await verified(one, reward(ASKED, 1.0))
    assert (written(outcome), asked) == ([], 0)


async def test_a_failed_grading_is_tried_again_where_that_may_help_and_no_other() -> None:
    broken = reward(ASKED, 0.0, "failed")
    assert isinstance((await verified(trajectory(ASKED), broken, ATTEMPTS - 1))[0], Retry)
    for said, attempt in [
        (broken, ATTEMPTS),
        (msgspec.structs.replace(broken, error_class="ConfigError"), 1),  # tomorrow it is as wrong as today
        (msgspec.structs.replace(broken, status="graded"), 1),
    ]:
        outcome, _ = await verified(trajectory(ASKED), said, attempt)
        assert written(outcome) == [said]


async def rolled(one: Trajectory, graded: Reward | None = None, asked: RolloutRequest = ASKED) -> list[Record]:
    runner: Any = Says((one, graded))
    return written(await RolloutHandler(RUN, runner, attempts=3)(delivered(asked)))


async def test_a_rollout_ends_with_what_the_log_must_know() -> None:
    good, score = trajectory(ASKED), reward(ASKED, 1.0)
    assert await rolled(good) == [good]
    assert await rolled(good, score) == [good, score]
    cancelled = msgspec.structs.replace(trajectory(ASKED, "cancelled"), detail="its deadline is past")
    assert await rolled(cancelled) == [cancelled, entry(ASKED, "cancelled", "its deadline is past")]


async def test_requests_of_other_runs_are_not_worked_on() -> None:
    assert await rolled(trajectory(ASKED), asked=msgspec.structs.replace(ASKED, run="x")) == []


async def test_each_worker_begins_with_another_gateway() -> None:
    assert [_from(["a", "b", "c"], number) for number in (0, 1, 5)] == [
        ["a", "b", "c"],
        ["b", "c", "a"],
        ["c", "a", "b"],
    ]


async def opened() -> MemoryLog:
    log = MemoryLog()
    await log.apply_topics(CATALOGUE)
    return log


async def test_an_archive_goes_on_where_it_ends_and_only_on_its_own_log() -> None:
    log = await opened()
    await log.publish(PolicyVersion(run=RUN, model="m", lineage="a", number=0, path="", checksum=""))
    place = ("policy.versions", 0)
    assert await archiver._starts(log, {}) == {}
    assert await archiver._starts(log, {place: 1}) == {place: 1}  # all of it is archived
    with pytest.raises(StorageError, match="this is another log"):
        await archiver._starts(log, {place: 2})
    many = await archiver._starts(log, {("turns", 0): 0})
    assert many == {("turns", partition): 0 for partition in range(12)}  # also where nothing is archived yet


class Trimmed(MemoryLog):
    """Of which the first three messages of a partition were removed."""

    async def beginning_offsets(self, topic: str) -> dict[int, int]:
        return dict.fromkeys(await super().beginning_offsets(topic), 3)


async def test_what_was_removed_before_it_was_archived_is_said_and_passed_over(
    caplog: pytest.LogCaptureFixture,
) -> None:
    log = Trimmed()
    await log.apply_topics(CATALOGUE)
    await log.publish(*map(version, range(5)))
    place = ("policy.versions", 0)
    assert await archiver._starts(log, {place: 4}) == {place: 4}
    assert caplog.text == ""
    assert await archiver._starts(log, {place: 1}) == {place: 3}
    assert "policy.versions[0]: 1 to 3 were removed" in caplog.text


def archiving(tmp_path: Path, log: MemoryLog) -> Context:
    config = load(None, ["archiver.flush_s=0.05"])
    return Context(config=config, run=RUN, run_dir=tmp_path, log=log, member="archiver", log_id="x")


async def test_what_is_on_the_log_when_it_ends_is_archived(tmp_path: Path) -> None:
    log = await opened()
    await log.publish(*map(version, range(5)))
    ctx = archiving(tmp_path, log)
    ctx.stopping.set()
    await archiver.Archiver().run(ctx)
    assert [d.record() for d in read_archive(tmp_path / "archive", ["policy.versions"])] == list(map(version, range(5)))


class FullOnce(ArchiveWriter):
    """On a disk that has no room the first time."""

    full = True

    def flush(self) -> list[Path]:
        if self.full:
            self.full = False
            raise OSError(errno.ENOSPC, "no space left on device")
        return super().flush()


async def test_a_disk_that_is_full_for_a_while_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(archiver, "ArchiveWriter", FullOnce)
    log = await opened()
    await log.publish(version(0))
    ctx = archiving(tmp_path, log)
    async with anyio.create_task_group() as group:
        group.start_soon(archiver.Archiver().run, ctx)
        await until(lambda: list((tmp_path / "archive").rglob("*.parquet")), "the archive")
        ctx.stopping.set()
    assert "the archive cannot be written and waits" in caplog.text
    assert [d.record() for d in read_archive(tmp_path / "archive", ["policy.versions"])] == [version(0)]


SETTINGS = [
    "run.steps=4", "sampler.groups_per_step=1", "sampler.group_size=2", "sampler.eval_every=2", "sampler.eval_tasks=2",
    "data.train='mend:train?count=3&seed=0'", "data.held_out='mend:held-out?count=3&seed=0'",
]  # fmt: skip


def version(number: int, run: str = RUN) -> PolicyVersion:
    return PolicyVersion(run=run, model="m", lineage="a", number=number, path="", checksum="")


class _Ready(Sampler):
    """Whose engines run every version at once."""

    async def _engines_adopt(self, ctx: Context) -> bool:
        return True


@asynccontextmanager
async def sampling(tmp_path: Path, *said: Record) -> AsyncIterator[tuple[Sampler, MemoryLog]]:
    """A sampler at work on a log that says this already."""
    log, sampler = await opened(), _Ready()
    await log.publish(*said)
    ctx = Context(config=load(None, SETTINGS), run=RUN, run_dir=tmp_path, log=log, member="sampler")
    async with anyio.create_task_group() as group:
        group.start_soon(sampler.run, ctx)
        yield sampler, log
        ctx.stopping.set()


FIRST = [request("demo-t000000", sample, 2) for sample in range(2)]


@pytest.mark.parametrize(("number", "rollouts"), [(0, 3), (2, 2), (4, 3)], ids=["before", "between", "after"])
async def test_an_evaluation_between_takes_some_tasks_and_those_at_the_ends_all(
    tmp_path: Path, number: int, rollouts: int
) -> None:
    async with sampling(tmp_path, *(FIRST if number else []), version(number)) as (sampler, log):
        await until(lambda: number in sampler.progress.eval_asked)
        written = await until_written(log, "rollout.requests", rollouts + 2 * bool(number))
    evaluated = [
        one for one in (d.record() for d in written) if isinstance(one, RolloutRequest) and one.purpose == "eval"
    ]
    assert sampler.progress.eval_asked == {number: {one.rollout_id for one in evaluated}}
    assert [one.round for one in evaluated] == [number] * rollouts


async def test_the_round_before_training_holds_it_back_until_it_is_settled(tmp_path: Path) -> None:
    async with sampling(tmp_path, version(0)) as (sampler, log):
        rounds = await until_written(log, "rollout.requests", 3)
        await anyio.wait_all_tasks_blocked()
        assert sampler.progress.admitted() == 0
        asked = [one for one in (d.record() for d in rounds) if isinstance(one, RolloutRequest)]
        await log.publish(*(reward(one, 1.0) for one in asked))
        await until(lambda: sampler.progress.admitted() == 3)


async def test_a_task_is_told_once_and_no_more_groups_are_asked_for_than_staleness_allows(tmp_path: Path) -> None:
    """Four, of three tasks; the first one was asked for in an earlier life."""
    async with sampling(tmp_path, *FIRST, version(1)) as (sampler, log):
        written = await until_written(log, "rollout.requests", 8)
        await until(lambda: sampler.progress.admitted() == 4)
        tasks = [d.record() for d in await everything(log, "tasks")]
    requests = [one for one in (d.record() for d in written) if isinstance(one, RolloutRequest)]
    assert sorted(one.rollout_id for one in requests) == [f"demo-t{n:06d}-{s}" for n in range(4) for s in (0, 1)]
    assert len({one.task_id for one in tasks if isinstance(one, Task)}) == len(tasks) == 3


@pytest.mark.parametrize("state", ["failed", "cancelled"])
async def test_an_evaluation_rollout_that_has_no_reward_is_settled_by_the_ledger(tmp_path: Path, state: str) -> None:
    ctx = Context(config=load(None), run=RUN, run_dir=tmp_path, log=await opened(), member="sampler")
    sampler, asked = Sampler(), request("demo-e00000-0000", 0, 1, "eval")
    sampler._read(ctx, delivered(asked))
    assert sampler.progress.round_open(0)
    sampler._read(ctx, delivered(msgspec.structs.replace(entry(asked, state), run="x")))
    assert sampler.progress.round_open(0), "another run's word"
    sampler._read(ctx, delivered(entry(asked, state)))
    assert not sampler.progress.round_open(0)
