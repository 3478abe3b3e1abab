"""Bad input through the packer's own stage, on both logs: it goes on, says what was wrong, and good groups come out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import anyio
import msgspec
import pytest

from consumers.packer import PackerHandler
from kat_stream.errors import DataError, LogError
from kat_stream.log import Log, Message, run_transform
from kat_stream.log.message import seal
from kat_stream.rl.group import GroupRules
from kat_stream.versions import Versions
from tests.contract.conftest import STAGES, Connect
from tests.contract.log_records import everything, until_committed, until_written
from tests.unit.records import RUN, request, reward, trajectory, turn
from topics import (
    DeadLetter,
    GroupClosed,
    PackedBatch,
    PolicyVersion,
    Record,
    Reward,
    Trajectory,
    partition_of,
    topic_named,
)

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("connect", STAGES, indirect=True)]
GROUP = f"{RUN}-t000000"
BAD = f"{RUN}-t000077"
MORE = [topic_named(name) for name in ("trajectories", "batches", "groups.closed", "policy.versions")]


def members(group: str = GROUP) -> list[Record]:
    """A whole group of two: trajectories and rewards."""
    records: list[Record] = []
    for sample in range(2):
        asked = request(group, sample)
        records += [trajectory(asked, turn(asked, [1, 2], [5 + sample])), reward(asked, float(sample))]
    return records


@pytest.fixture
async def log(connect: Connect) -> Log:
    opened = await connect()
    await opened.apply_topics(MORE)
    await opened.publish(PolicyVersion(run=RUN, model="m", lineage="a", number=0, path="", checksum=""))
    return opened


@asynccontextmanager
async def packing(log: Log, member: str = "m") -> AsyncIterator[None]:
    versions, stopping = Versions(RUN), anyio.Event()
    await versions.load(log)
    handler = PackerHandler(RUN, versions, GroupRules(staleness=2, budget_tokens=256))

    async def stage() -> None:
        topics = ("trajectories", "rewards")
        await run_transform(
            log, topics, group="p", member=member, handler=handler, stopping=stopping, remember="groups.closed"
        )

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stage)
        yield
        stopping.set()


async def packed(log: Log, count: int) -> list[PackedBatch]:
    """The batches, once there are so many."""
    return [d.record() for d in await until_written(log, "batches", count)]  # type: ignore[misc]


async def letters(log: Log) -> list[DeadLetter]:
    return [d.record() for d in await everything(log, "dead.letters")]  # type: ignore[misc]


def raw(value: bytes, name: bytes = b"Reward/1") -> Message:
    return Message("rewards", partition_of(reward(request(BAD), 1.0)), BAD.encode(), value, {"record": name})


VALUE = seal(reward(request(BAD), 1.0)).value
UNREADABLE = {
    "undecodable bytes": (raw(b"\xc1garbage"), "Reward/1"),
    "unknown version": (raw(VALUE, b"Reward/99"), "Reward/99"),
    "no header": (raw(VALUE, b""), "header"),
    "truncated": (raw(VALUE[:-7]), "truncated"),
    "length of 4 GiB": (raw(b"\xdf\xff\xff\xff\xff"), "Reward/1"),
    "text that is not UTF-8": (raw(VALUE.replace(b"harbor", b"\xff\xfe\xfd\xfc\xfb\xfa")), "utf-8"),
    "nested 5000 deep": (raw(b"\x82\xa3run\xa1r\xa1x" + b"\x91" * 5000 + b"\xc0"), "recursion"),
}


async def test_what_cannot_be_read_is_a_dead_letter_with_its_bytes(log: Log) -> None:
    """All kinds in one partition: none of them keeps the next one, or the good group, from being handled."""
    await log.append(*[message for message, _ in UNREADABLE.values()])
    await log.publish(*members())
    async with packing(log):
        (batch,) = await packed(log, 1)
        await until_committed(log, "p", "trajectories", "rewards")
    found = sorted(await letters(log), key=lambda letter: letter.offset)
    for letter, (kind, (message, said)) in zip(found, UNREADABLE.items(), strict=True):
        assert (letter.value, letter.topic, letter.error_type) == (message.value, "rewards", "DecodeError"), kind
        assert said in letter.message, kind
    assert batch.group_id == GROUP and [member.fate for member in batch.members] == ["packed", "packed"]


def _with_turn(group: str, **fields: object) -> list[Record]:
    first, *others = members(group)
    assert isinstance(first, Trajectory)
    return [msgspec.structs.replace(first, turns=(msgspec.structs.replace(first.turns[0], **fields),)), *others]


BAD_TURNS: dict[str, dict[str, object]] = {
    "sampled_ids has 3 bytes": {"sampled_ids": b"\x01\x00\x00"},
    "logprobs": {"logprobs": b""},
    "prefix_len is -3": {"prefix_len": -3},
    "bad_turn": {"spans": ()},
}


async def test_a_turn_that_cannot_be_trained_on_is_a_counted_filter(log: Log) -> None:
    said_of = {f"{RUN}-t{number:06d}": said for number, said in enumerate(BAD_TURNS)}
    for group, said in said_of.items():
        await log.publish(*_with_turn(group, **BAD_TURNS[said]))
    async with packing(log):
        batches = await packed(log, len(said_of))
    assert {batch.group_id for batch in batches} == said_of.keys()
    for batch in batches:
        assert batch.members[0].fate == "filtered" and said_of[batch.group_id] in batch.members[0].reason
    assert await letters(log) == []


async def test_a_score_that_is_no_number_does_not_hold_its_group(log: Log) -> None:
    for number, score in enumerate((float("nan"), float("inf"))):
        *others, last = members(f"{RUN}-t{number:06d}")
        assert isinstance(last, Reward)
        await log.publish(*others, msgspec.structs.replace(last, score=score))
    async with packing(log):
        batches = await packed(log, 2)
    for batch in batches:
        assert batch.members[1].fate == "failed" and batch.members[1].reason.startswith("bad_reward")


async def test_records_of_another_run_are_passed_over(log: Log) -> None:
    await log.publish(*[msgspec.structs.replace(record, run="other") for record in members()])
    await log.publish(*members())
    async with packing(log):
        batches = await packed(log, 1)
    assert [batch.run for batch in batches] == [RUN] and await letters(log) == []


async def test_duplicates_and_a_reward_for_an_unknown_rollout_change_nothing(log: Log) -> None:
    stranger = msgspec.structs.replace(members()[1], rollout_id="nobody")  # type: ignore[type-var]
    await log.publish(stranger, *members(), *members())
    async with packing(log):
        (batch,) = await packed(log, 1)
        await log.publish(*members(f"{RUN}-t000001"), *members())
        batches = await packed(log, 2)
    assert len(batches) == 2 and len(batch.members) == 2


async def test_a_record_on_the_wrong_partition_is_a_dead_letter(log: Log) -> None:
    """As a producer would place it that believes in another partition count."""
    message = seal(members()[0])
    await log.append(replace(message, partition=(message.partition + 1) % 12))
    await log.publish(*members())
    async with packing(log):
        await packed(log, 1)
    (letter,) = await letters(log)
    assert f"belongs on partition {message.partition % 12}" in letter.message


async def test_a_topic_with_another_partition_count_is_refused(log: Log) -> None:
    with pytest.raises(LogError, match="trajectories"):
        await log.apply_topics([replace(topic_named("trajectories"), partitions=5)])


async def test_a_record_of_50_mb_is_refused_where_it_is_published(log: Log) -> None:
    first = members()[0]
    assert isinstance(first, Trajectory)
    with pytest.raises(DataError, match="trajectories"):
        await log.publish(msgspec.structs.replace(first, patch=bytes(50 << 20)))
    assert await everything(log, "trajectories") == []


async def test_a_closed_group_that_cannot_be_read_is_known_by_its_key(log: Log) -> None:
    await log.append(replace(seal(GroupClosed(run=RUN, group_id=GROUP)), value=b"\xc1"))
    await log.publish(*members(), *members(f"{RUN}-t000001"))
    async with packing(log):
        await until_committed(log, "p", "trajectories", "rewards")
    found = [delivered.record() for delivered in await everything(log, "batches")]
    assert [record.group_id for record in found] == [f"{RUN}-t000001"]  # type: ignore[attr-defined]
