"""What a run is doing, reduced from its records."""

from __future__ import annotations

import random
import tracemalloc
from typing import Any

import msgspec
import pytest

from kat_stream.observe.seen import Seen
from kat_stream.observe.state import RunState
from tests import observe_kit as fab
from tests.observe_kit import FabricatedRun
from topics.record import Record, encode


def reduced(records: list[Any]) -> RunState:
    state = RunState()
    for record, timestamp_ms in records:
        state.apply(record, timestamp_ms)
    return state


def test_steps_show_reward_loss_staleness_and_tokens(small_run: FabricatedRun) -> None:
    first, second = reduced(small_run.records).steps
    # Samples 0 to 3 score 0 1 0 1; sample 2 failed on our side in the first group, and was cancelled in the second.
    assert (first.reward, second.reward) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert (first.step, first.trained, first.filtered) == (1, 2, 2)
    assert (second.loss, second.clip_fraction, second.seconds) == (-0.02, 0.05, 0.8)
    assert (first.staleness_mean, second.staleness_mean, second.staleness_max) == (0, 1, 1)
    assert (first.tree_tokens, first.flat_tokens) == (75, 120)
    assert 0 < first.wall_s < second.wall_s


def test_rounds_leave_our_failures_out_of_the_pass_rate(small_run: FabricatedRun) -> None:
    before, after = reduced(small_run.records).rounds
    assert (before.round, before.requested, before.graded, before.failed) == (0, 4, 3, 1)
    assert before.pass_rate == pytest.approx(1 / 3)
    assert before.complete
    assert (after.round, after.pass_rate) == (2, 0.75)


def test_a_round_with_open_rollouts_is_not_complete() -> None:
    run = fab.FabricatedRun()
    run.evaluation(0, ["passed", "requested"])
    (round_,) = reduced(run.records).rounds
    assert not round_.complete
    assert round_.pass_rate == 1.0


def test_counts_and_version(small_run: FabricatedRun) -> None:
    state = reduced(small_run.records)
    assert (state.requested, state.train_rollouts, state.steps_done) == (20, 11, 2)
    assert state.in_flight == 1
    assert state.version == "a.2"
    turns = [record for record, _ in small_run.records if type(record).__name__ == "Turn"]
    assert state.sampled_tokens == sum(len(turn.sampled_ids) // 4 for turn in turns) > 0


def test_order_and_repetition_change_no_step_and_no_round(small_run: FabricatedRun) -> None:
    shuffled = small_run.records * 2
    random.Random(7).shuffle(shuffled)
    there, back = reduced(shuffled), reduced(small_run.records)
    assert there.steps == back.steps
    assert there.rounds == back.rounds
    assert (there.in_flight, there.sampled_tokens, there.version) == (back.in_flight, back.sampled_tokens, back.version)


def test_watching_a_run_for_weeks_takes_little_memory() -> None:
    """Under 250 bytes a rollout, all told. What was kept by name, and as records, took a kilobyte."""
    state, size = RunState(), 32

    def said(steps: range) -> list[tuple[bytes, type[Record], int]]:
        run = FabricatedRun()
        for number in steps:
            run.train_group(number, ["trained"] * size)
        return [(encode(record), type(record), timestamp_ms) for record, timestamp_ms in run.records]

    def watch(records: list[tuple[bytes, type[Record], int]]) -> int:
        for value, kind, timestamp_ms in records:
            state.apply(msgspec.msgpack.decode(value, type=kind), timestamp_ms)  # with strings of its own
        return len(state.steps)

    assert watch(said(range(1, 6))) == 5
    more = said(range(6, 21))
    tracemalloc.start()
    try:
        assert watch(more) == 20
        grown, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert grown / (15 * size) < 250
    assert (state.requested, state.in_flight, state.train_rollouts) == (20 * size, 0, 20 * size)


def test_names_seen_are_those_that_were_added() -> None:
    seen, names = Seen(), [f"run-t{number:06d}-{number % 8}" for number in range(5_000)]
    assert [seen.add(name) for name in [*names, *names]] == [True] * 5_000 + [False] * 5_000
    assert len(seen) == 5_000 and all(name in seen for name in names)
    assert not any(f"{name}-0" in seen for name in names)


def test_the_token_rate_is_that_of_the_last_seconds() -> None:
    state = RunState()
    asked = fab.request("demo-t000001", 0, 1)
    first, second = fab.turns(asked)
    state.apply(asked, fab.START_MS)
    state.apply(first, fab.START_MS + 1_000)
    state.apply(second, fab.START_MS + 20_000)
    assert state.tokens_per_s() == pytest.approx(2 / 10)
    assert state.tokens_per_s(fab.START_MS + 60_000) == 0


def test_the_surviving_lineage_replaces_the_steps_that_it_makes_again(small_run: FabricatedRun) -> None:
    late = fab.START_MS / 1000 + 99
    again = fab.step(2, ["demo-t000002"], [], ["demo-t000002-0"], lineage="b", unix_s=late)
    steps = reduced([*small_run.records, (again, int(late * 1000))]).steps
    assert [(step.step, step.trained) for step in steps] == [(1, 2), (2, 0)]
