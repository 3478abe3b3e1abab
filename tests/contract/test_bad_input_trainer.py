"""A batch that cannot be used: a dead letter, a group that still counts, and rollouts that the ledger closes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from consumers.trainer import Trainer
from kat_stream.config import load
from kat_stream.log import Log, Message
from kat_stream.log.message import seal
from kat_stream.observe.ledger import Fate, Ledger
from kat_stream.policy import model_dir
from kat_stream.rl.group import GroupRules, pack_group
from kat_stream.service import Context
from kat_stream.training.learner import LearnerConfig, TorchLearner
from kat_stream.trees.wire import ROW_FIELDS
from kat_stream.versions import Versions
from tests.contract.conftest import STAGES, Connect
from tests.contract.log_records import everything
from tests.unit.records import RUN, request, reward, trajectory, turn
from topics import LedgerEntry, PackedBatch, PackedRow, topic_named
from topics.record import pack_ints

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("connect", STAGES, indirect=True)]


def batch(group: str = f"{RUN}-t000000") -> PackedBatch:
    pairs = []
    for sample in range(2):
        asked = request(group, sample)
        pairs.append((trajectory(asked, turn(asked, [1, 2], [5 + sample])), reward(asked, float(sample))))
    return pack_group(pairs, "a.0", {}, GroupRules(staleness=2, budget_tokens=256))


def spoilt(good: PackedBatch, kind: str) -> Message:
    """The batch's message with one thing wrong."""
    (row,) = good.rows
    match kind:
        case "garbage":
            return replace(seal(good), value=b"\xc1garbage")
        case "truncated":
            row = msgspec.structs.replace(row, ids=row.ids[:-3])
        case "negative length":
            row = msgspec.structs.replace(row, turn_len=pack_ints([-1, 2]))
        case "foreign token":
            row = msgspec.structs.replace(row, ids=pack_ints([1 << 30] * (len(row.ids) // 4)))
        case "row without a turn":
            empty = PackedRow(**dict.fromkeys(ROW_FIELDS, b""))
            return seal(msgspec.structs.replace(good, rows=(row, empty)))
        case "version":
            members = tuple(msgspec.structs.replace(member, oldest_version="?") for member in good.members)
            return seal(msgspec.structs.replace(good, members=members))
    return seal(msgspec.structs.replace(good, rows=(row,)))


@pytest.fixture
async def log(connect: Connect) -> Log:
    opened = await connect()
    await opened.apply_topics([topic_named(name) for name in ("batches", "policy.versions")])
    return opened


def trainer(ctx: Context) -> Trainer:
    made = Trainer()
    made.learner = TorchLearner(model_dir("demo"), LearnerConfig())
    made.versions = Versions(RUN)
    return made


@pytest.mark.parametrize(
    "kind", ["garbage", "truncated", "negative length", "foreign token", "row without a turn", "version"]
)
async def test_a_spoilt_batch_counts_empty_and_its_rollouts_are_filtered(log: Log, tmp_path: Path, kind: str) -> None:
    good = batch()
    said = [
        LedgerEntry(run=RUN, group_id=good.group_id, rollout_id=m.rollout_id, state="packed", stage="packer")
        for m in good.members
    ]
    requests = [request(good.group_id, sample) for sample in range(2)]
    await log.publish(*said)
    await log.append(spoilt(good, kind))
    ctx = Context(load(None), RUN, tmp_path, log, "trainer")
    made = trainer(ctx)
    async with log.follow(("batches",), poll_s=0.05) as follower:
        found = None
        while found is None and (made.arrived or not await follower.caught_up()):
            found = await made._next(ctx, follower)
    assert found is not None, "the group counts"
    assert found[1].group_id == good.group_id and found[1].rows == ()
    assert {member.fate for member in found[1].members} == {"filtered"}
    (letter,) = await everything(log, "dead.letters")
    assert letter.record().stage == f"{RUN}.trainer"  # type: ignore[attr-defined]
    ledger = Ledger()
    for record in (*requests, good, *[d.record() for d in await everything(log, "ledger")]):
        ledger.apply(record)
    assert set(ledger.fates().values()) == {Fate("filtered", "bad_batch")}
    assert ledger.check() == []


async def test_garbage_under_a_key_that_nobody_waits_for_is_no_group(log: Log, tmp_path: Path) -> None:
    await log.append(spoilt(batch(), "garbage"))
    ctx = Context(load(None), RUN, tmp_path, log, "trainer")
    made = trainer(ctx)
    async with log.follow(("batches",), poll_s=0.05) as follower:
        while made.arrived or not await follower.caught_up():
            assert await made._next(ctx, follower) is None
    assert len(await everything(log, "dead.letters")) == 1
