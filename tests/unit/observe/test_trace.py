"""The story of a rollout, word for word, on a fabricated run."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from kat_stream.observe.trace import RolloutTrace
from tests import observe_kit as fab
from tests.observe_kit import FabricatedRun
from tests.unit.records import turn
from topics import PackedBatch

TRAINED = """\
rollout demo-t000001-1
  for training: sample 2 of 4 of group demo-t000001
  task mend/rename-17 of mend:train, agent shell, graded by harbor:
    tests/test.sh fails.
    Mend it.
14:13:22.300 requested: temperature 1, top-p 1, at most 6 turns of 40 tokens, 1024 in all
14:13:23.400 turn 0: prompt 4 new tokens (0 cached); sampled 3 from a.0 by engine-0 in 0.25 s, log-prob -1.50, stop
    < abcd
    > mv a b
    prompt ids:
      1 2 3 4
    sampled:
      10'j':-0.500 11'k':-0.500 2'b':-0.500
14:13:23.500 turn 1: prompt 2 new tokens after 7 of turn 0 (7 cached); sampled 2 from a.0 by engine-0 in 0.25 s, \
log-prob -1.00, stop
    < ef
    > submit
    prompt ids:
      5 6
    sampled:
      12'l':-0.500 2'b':-0.500
14:13:23.600 ended: submitted: the agent says it is done; 2 turns, 1.50 s, sandbox 0.50 s
    patch of 34 bytes:
      --- a/x
      +++ b/x
      @@ -1 +1 @@
      -1
      +2
14:13:23.700 graded 1 by harbor 1 in 0.20 s
    1 passed
14:13:24.300 packed: 2 turns, 5 sampled tokens, oldest version a.0, advantage +0.333; group demo-t000001 with \
rewards 0 [1] - 1; 1 row, 75 tree tokens for 120 flat
14:13:24.800 trained in step 1 (lineage a) with 2 rollouts: loss -0.0100, mean_ratio 1.0100, clip_fraction 0.0500, \
log_ratio_abs 0.0200
fate: trained in step 1"""


def letters(ids: Sequence[int]) -> str:
    return "".join(chr(96 + i) for i in ids)


def story(records: list[Any], rollout_id: str, **options: Any) -> str:
    trace = RolloutTrace(rollout_id)
    for record, timestamp_ms in records:
        trace.apply(record, timestamp_ms)
    return "\n".join(trace.lines(**options))


def test_a_trained_rollout_from_request_to_step(small_run: FabricatedRun) -> None:
    assert story(small_run.records, "demo-t000001-1", tokens=True, decode=letters) == TRAINED


def test_order_and_repetition_change_nothing(small_run: FabricatedRun) -> None:
    shuffled = small_run.records * 2
    random.Random(3).shuffle(shuffled)
    assert story(shuffled, "demo-t000001-1", tokens=True, decode=letters) == TRAINED


def test_why_a_rollout_is_in_no_step(small_run: FabricatedRun) -> None:
    filtered = story(small_run.records, "demo-t000003-1")
    assert "left out: filtered (equal_rewards); group demo-t000003 with rewards 0 [1]" in filtered
    assert filtered.endswith("fate: filtered (equal_rewards)")
    assert story(small_run.records, "demo-t000001-3").endswith("fate: stale in step 1")
    assert "refused as too old by step 1" in story(small_run.records, "demo-t000001-3")
    failed = story(small_run.records, "demo-t000001-2")
    assert "SandboxUnavailable: no space left" in failed
    assert "changed nothing" not in failed
    assert story(small_run.records, "demo-t000004-1").endswith("fate: in flight (requested)")


def test_both_lives_of_a_rollout_that_ran_twice_are_told() -> None:
    asked = fab.request("demo-t000001", 0, 1)
    records: list[Any] = [asked]
    for life, score in (("a", 0.0), ("b", 1.0)):
        records.append(msgspec.structs.replace(fab.trajectory(asked), life=life))
        records.append(msgspec.structs.replace(fab.reward(asked, score), life=life))
    told = story([(record, fab.START_MS + n) for n, record in enumerate(records)], asked.rollout_id)
    assert told.count(" ended: submitted") == 2
    assert told.index(" graded 0 by") < told.index(" graded 1 by")


def test_a_failure_that_only_the_ledger_knows_is_told_once() -> None:
    run = fab.FabricatedRun()
    run.train_group(1, ["failed entry"])
    told = story(run.records, "demo-t000001-0")
    assert told.count("failed (DeadlineExceeded: nothing within 60 s), says rollout") == 1


def test_an_unknown_rollout_is_not_known(small_run: FabricatedRun) -> None:
    trace = RolloutTrace("nobody")
    for record, timestamp_ms in small_run.records:
        trace.apply(record, timestamp_ms)
    assert not trace.known
    assert trace.fate.state == "unknown"


def test_terminal_control_characters_never_reach_the_terminal() -> None:
    asked = fab.request("demo-t000001", 0, 1)
    evil = msgspec.structs.replace(fab.turns(asked)[0], content="ls \x1b[2J\x07\nrm\r")
    told = story([(asked, fab.START_MS), (evil, fab.START_MS + 1)], asked.rollout_id)
    assert "\x1b" not in told
    assert "\x07" not in told
    assert "    > ls �[2J�\n    > rm�" in told


def test_what_became_of_a_session_is_told_in_words() -> None:
    asked = fab.request("demo-t000001", 0, 1)
    end = turn(asked, [], [], index=-1, side="end")
    told = story([(asked, fab.START_MS), (end, fab.START_MS + 1)], asked.rollout_id)
    assert "14:13:20.001 the session has ended\n" in told and "turn -1" not in told


@pytest.mark.parametrize("tokens", [False, True])
def test_a_turn_whose_arrays_are_damaged_is_one_line_of_the_story(tokens: bool) -> None:
    asked = fab.request("demo-t000001", 0, 1)
    first, second = fab.turns(asked)
    cut = msgspec.structs.replace(first, logprobs=first.logprobs[:-3])
    told = story(
        [(asked, fab.START_MS), (cut, fab.START_MS + 1), (second, fab.START_MS + 2)], asked.rollout_id, tokens=tokens
    )
    assert " turn 0 cannot be shown: bytes length not a multiple of item size\n" in told
    assert " turn 1: prompt 2 new tokens after 7 of turn 0" in told


def test_a_turn_with_too_few_log_probs_is_told_but_not_its_tokens() -> None:
    asked = fab.request("demo-t000001", 0, 1)
    short = msgspec.structs.replace(fab.turns(asked)[0], logprobs=b"")
    assert "sampled 3 from a.0" in story([(asked, fab.START_MS), (short, fab.START_MS)], asked.rollout_id)
    assert "turn 0 cannot be shown" in story(
        [(asked, fab.START_MS), (short, fab.START_MS)], asked.rollout_id, tokens=True
    )


def test_a_batch_whose_arrays_are_damaged_is_one_line_of_the_story(small_run: FabricatedRun) -> None:
    records = [
        (msgspec.structs.replace(r, rows=(msgspec.structs.replace(r.rows[0], advantage=b"\0"),)), ms)
        if isinstance(r, PackedBatch) and r.rows
        else (r, ms)
        for r, ms in small_run.records
    ]
    told = story(records, "demo-t000001-1")
    assert " PackedBatch cannot be shown: " in told
    assert told.endswith("fate: trained in step 1")
