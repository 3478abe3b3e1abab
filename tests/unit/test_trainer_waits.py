"""A trainer whose groups do not come says what it waits for, and stops only if nothing of its run goes on either."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import pytest
from msgspec.structs import replace

from kat_stream.config import load
from kat_stream.errors import DeadlineExceeded
from kat_stream.log.memory import MemoryLog
from kat_stream.log.message import seal
from kat_stream.observe.signs import Signs
from kat_stream.service import Context
from tests.contract.test_bad_input_trainer import batch, trainer
from tests.unit.records import RUN, request, reward
from topics import CATALOGUE, LedgerEntry, Record

pytestmark = pytest.mark.anyio
ASKED = request(f"{RUN}-t000000")
ENDED = LedgerEntry(run=RUN, group_id=ASKED.group_id, rollout_id=ASKED.rollout_id, state="failed", stage="rollout")


@pytest.fixture
async def log() -> MemoryLog:
    made = MemoryLog()
    await made.apply_topics(CATALOGUE)
    return made


class _Hearer(logging.Handler):
    def __init__(self, hear: Callable[[str], None]) -> None:
        super().__init__()
        self.hear = hear

    def emit(self, record: logging.LogRecord) -> None:
        self.hear(record.getMessage())


@pytest.fixture
def answers(log: MemoryLog) -> Iterator[list[Record]]:
    """One of these comes each time that the trainer says that it waits."""
    left: list[Record] = []

    def hear(line: str) -> None:
        assert line.startswith("waiting for group 1 of 1 for step 1 for ")
        log.store([seal(left.pop(0))] if left else [])

    hearer, logger = _Hearer(hear), logging.getLogger("consumers.trainer")
    logger.addHandler(hearer)
    yield left
    logger.removeHandler(hearer)


async def gather(log: MemoryLog, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The groups of one step, for a trainer that looks at once and takes any silence between two looks for the end."""
    monkeypatch.setattr("consumers.trainer.GRACE_S", 0.0)
    moment = 0.001
    changes = [f"trainer.step_timeout_s={moment}", f"sampler.rollout_timeout_s={moment}", "sampler.groups_per_step=1"]
    ctx = Context(load(None, changes), RUN, run_dir, log, "trainer")
    with anyio.fail_after(60):
        async with log.follow(("batches",), poll_s=0.05) as follower:
            arrivals = await trainer(ctx)._gather(ctx, follower)
    assert arrivals is not None
    return [group.group_id for _, group in arrivals]


async def test_a_trainer_waits_for_as_long_as_its_run_goes_on(
    log: MemoryLog, answers: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers += [ASKED, reward(ASKED, 1.0), ENDED, batch()]
    assert await gather(log, tmp_path, monkeypatch) == [batch().group_id]
    assert answers == []


async def test_a_trainer_whose_run_has_stood_still_stops_whatever_another_run_does(
    log: MemoryLog, answers: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers += [ASKED, replace(ENDED, run="another"), batch()]
    with pytest.raises(DeadlineExceeded, match="group 1 of 1 for step 1, or any sign that the run goes on: nothing"):
        await gather(log, tmp_path, monkeypatch)
    assert answers == [batch()]


@pytest.mark.parametrize("sign", [ASKED, reward(ASKED, 1.0), ENDED], ids=["asked for", "graded", "ended"])
async def test_a_record_is_a_sign_of_its_own_run_once(log: MemoryLog, sign: Record) -> None:
    await log.publish(sign)
    own, foreign = Signs(log, RUN), Signs(log, "another")
    assert await own.since_last_look() and await foreign.since_last_look()
    assert not await own.since_last_look()
    await log.append(dataclasses.replace(seal(sign), value=b"\xc1garbage"), seal(sign))
    assert await own.since_last_look() and not await foreign.since_last_look()
    assert not await own.since_last_look()
