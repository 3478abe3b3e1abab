"""Clocks that jump: no group is closed wrongly, nothing waits an hour more, lag is never negative, the account stays.

Whatever time a message bears, it is shown on one line.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consumers import packer
from consumers.packer import PackerHandler
from kat_stream.log import MemoryLog, handling, memory, retries, run_work
from kat_stream.log.base import Delivered, Position
from kat_stream.log.outcome import Emit, Outcome, Retry
from kat_stream.observe.ledger import Ledger
from kat_stream.observe.lineages import surviving, time_of_step
from kat_stream.observe.stage_lag import stage_lags
from kat_stream.observe.state import RunState
from kat_stream.observe.tail import json_line, line
from kat_stream.rl.group import GroupRules
from kat_stream.rl.incomplete import GRACE_S, LONGEST_TURN_S, Listening
from kat_stream.versions import Versions
from tests import observe_kit as kit
from topics import CATALOGUE, PackedBatch, Record, encode, header_of, partition_of, topic_of

TIMES = [-1, 0, -(1 << 62), (1 << 62), kit.START_MS - 10**10, kit.START_MS + 10**10]


@pytest.mark.parametrize("timestamp_ms", TIMES)
def test_any_time_is_shown_on_one_line(timestamp_ms: int) -> None:
    for delivered in kit.small().delivered():
        late = replace(delivered, timestamp_ms=timestamp_ms)
        assert "\n" not in line(late) and "\n" not in json_line(late)
    assert line(late).startswith("--:--:--.---") == (not 0 <= timestamp_ms < 253_402_300_800_000)


def test_an_account_does_not_depend_on_clocks() -> None:
    run = kit.small()
    ledger, state = Ledger(), RunState(run=kit.RUN)
    for at, (record, _) in enumerate(run.records):
        ledger.apply(record)
        state.apply(record, TIMES[at % len(TIMES)])
    summary = ledger.summary()
    assert summary.requested == summary.accounted == sum(run.expected.values())
    assert state.steps_done == 2


HOUR_S = 3600.0
ROLLOUT_S = 1800.0
LEAST_S = ROLLOUT_S + GRACE_S
TURN_S = LONGEST_TURN_S
jumps = st.sampled_from([0.0, HOUR_S, -HOUR_S])


class Stage:
    """The packer's handler under a monotonic clock of its own; its wall clock is not asked."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now_s, self.offset = 0.0, 0
        patch.setattr(packer, "time", SimpleNamespace(monotonic=lambda: self.now_s))
        versions = Versions(kit.RUN)
        versions.take(kit.version(0))
        self.handler = PackerHandler(kit.RUN, versions, GroupRules(staleness=2, budget_tokens=256), rollout_s=ROLLOUT_S)
        self.partition = partition_of(kit.request(GROUP, 0, 2))
        self.handler.assigned(self.partition, [])

    def hear(self, record: Record, jump_s: float) -> list[PackedBatch]:
        """One message of a producer whose clock is wrong by `jump_s`."""
        self.offset += 1
        stamp_ms = kit.START_MS + int((self.now_s + jump_s) * 1000)
        position = Position(topic_of(record).name, self.partition, self.offset)
        one = Delivered(position, None, encode(record), {"record": header_of(type(record)).encode()}, stamp_ms)
        outcome = anyio.run(self.handler.handle, one)
        return batches_of(outcome) + self.turn(0.0)

    def listen(self, seconds: float) -> list[PackedBatch]:
        found: list[PackedBatch] = []
        for _ in range(int(seconds / TURN_S)):
            found += self.turn(TURN_S)
        return found

    def turn(self, seconds: float) -> list[PackedBatch]:
        self.now_s += seconds
        return batches_of(self.handler.late(self.partition))


def batches_of(outcome: Outcome | None) -> list[PackedBatch]:
    return [r for r in outcome.records if isinstance(r, PackedBatch)] if isinstance(outcome, Emit) else []


GROUP = f"{kit.RUN}-t000001"
MEMBERS = [kit.request(GROUP, sample, 2) for sample in range(2)]
WHOLE: list[Record] = [r for one in MEMBERS for r in (kit.trajectory(one), kit.reward(one, float(one.sample)))]


@given(st.lists(st.tuples(st.integers(0, 12), st.booleans()), max_size=20))
def test_only_time_that_a_stage_listened_counts_and_the_log_comes_on_by_it_in_silence(
    turns: list[tuple[int, bool]],
) -> None:
    partition, now_s = Listening(0.0), 0.0
    for gap_s, hears in turns:
        if hears:
            partition.hear(-1.0)
        now_s += gap_s
        partition.turn(now_s)
    counted = [(min(gap_s, LONGEST_TURN_S), hears) for gap_s, hears in turns]
    assert partition.listened_s == sum(seconds for seconds, _ in counted)
    assert partition.log_s == sum(seconds for seconds, hears in counted if not hears)


@given(st.lists(jumps, min_size=4, max_size=4), st.lists(st.floats(0, LEAST_S / 3 - TURN_S), min_size=3, max_size=3))
@settings(max_examples=30)
def test_no_group_is_given_up_while_its_members_may_still_come(wrong_s: list[float], pauses_s: list[float]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stage = Stage(patch)
        found: list[PackedBatch] = []
        for record, jump_s, pause_s in zip(WHOLE, wrong_s, [*pauses_s, 0.0], strict=True):
            assert found == []
            found = stage.hear(record, jump_s) + stage.listen(pause_s)
        assert [[m.fate for m in batch.members] for batch in found] == [["packed", "packed"]]


@given(st.lists(jumps, min_size=3, max_size=3))
@settings(max_examples=10)
def test_a_group_that_lacks_a_member_is_given_up_once_however_clocks_jump(wrong_s: list[float]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stage = Stage(patch)
        for record, jump_s in zip(WHOLE[:3], wrong_s, strict=True):
            assert stage.hear(record, jump_s) == []
        found = stage.listen(LEAST_S + 2 * HOUR_S + 2 * TURN_S)
        assert [[m.reason for m in batch.members] for batch in found] == [["incomplete", "incomplete"]]


def test_a_stage_that_stood_still_for_a_day_gives_nothing_up_before_it_has_listened() -> None:
    with pytest.MonkeyPatch.context() as patch:
        stage = Stage(patch)
        assert stage.hear(WHOLE[0], 0.0) == []
        assert stage.turn(24 * HOUR_S) == []
        assert [stage.hear(record, 0.0) for record in WHOLE[1:3]] == [[], []]
        (batch,) = stage.hear(WHOLE[3], 0.0)
        assert [member.fate for member in batch.members] == ["packed", "packed"]


@pytest.mark.parametrize("wrong_s", [HOUR_S, -HOUR_S])
def test_lag_in_seconds_is_never_negative_and_messages_do_not_depend_on_clocks(
    monkeypatch: pytest.MonkeyPatch, wrong_s: float
) -> None:
    async def scenario() -> None:
        log = MemoryLog()
        await log.apply_topics(CATALOGUE)
        now_ns = time.time_ns
        with monkeypatch.context() as patch:
            patch.setattr(memory, "time", SimpleNamespace(time_ns=lambda: now_ns() + int(wrong_s * 1e9)))
            await log.publish(*[record for record, _ in kit.small().records])
        (lag,) = [lag for lag in await stage_lags(log, kit.RUN, None) if lag.group == "trainer"]
        assert lag.messages == sum((await log.end_offsets("batches")).values()) > 0
        assert lag.seconds is not None and 0 < lag.seconds <= max(1.0, -wrong_s + 60)

    anyio.run(scenario)


@pytest.mark.parametrize("wrong_s", [HOUR_S, -HOUR_S])
def test_a_retry_waits_its_tier_s_time_and_not_an_hour(monkeypatch: pytest.MonkeyPatch, wrong_s: float) -> None:
    """The clock that says when it is due is wrong by an hour."""
    monkeypatch.setitem(retries.TIERS, "retries.10s", 0.2)
    monkeypatch.setattr(handling, "IN_PLACE_S", 0.05)
    real: Callable[[], float] = time.time
    attempts: list[int] = []

    async def handler(delivered: Delivered) -> Outcome:
        attempts.append(retries.attempt_of(delivered))
        if len(attempts) == 1:
            monkeypatch.setattr(retries, "time", SimpleNamespace(time=lambda: real() + wrong_s))
            return Retry(0.1, "later")
        stopping.set()
        return Emit()

    stopping = anyio.Event()

    async def scenario() -> None:
        log = MemoryLog()
        await log.apply_topics(CATALOGUE)
        await log.publish(kit.reward(MEMBERS[0], 1.0))
        monkeypatch.setattr(retries, "time", SimpleNamespace(time=lambda: real() - wrong_s))
        with anyio.fail_after(60):
            await run_work(log, ["rewards"], group="w", member="m", handler=handler, stopping=stopping, drain_s=1.0)

    anyio.run(scenario)
    assert attempts == [1, 2]


@given(st.lists(st.sampled_from([-2 * HOUR_S, -HOUR_S, 0.5, HOUR_S]), min_size=6, max_size=6), st.integers(0, 2**32))
def test_the_lineage_that_was_opened_later_counts_whatever_the_trainer_s_clock_did(
    moves: list[float], seed: int
) -> None:
    """Lineage a makes steps 1 to 3; b goes on from step 1 and c from step 2 of b. The clock jumps before each step."""
    now_s, newest_s, made = 1e9, 0.0, []
    plan = [("a", 1), ("a", 2), ("a", 3), ("b", 2), ("c", 3), ("c", 4)]
    for (lineage, number), move in zip(plan, moves, strict=True):
        now_s += move
        newest_s = time_of_step(now_s, newest_s)
        made.append(kit.step(number, [], [], lineage=lineage, unix_s=newest_s))
    random.Random(seed).shuffle(made)
    assert [(step.lineage, step.step) for step in surviving(made)] == [("a", 1), ("b", 2), ("c", 3), ("c", 4)]
