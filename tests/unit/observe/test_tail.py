"""One line a message, for people and for programs."""

from __future__ import annotations

import json

import pytest

from kat_stream.log.base import Delivered, Position
from kat_stream.observe import tail
from tests import observe_kit as fab
from tests.observe_kit import FabricatedRun
from tests.unit.records import turn
from topics.turn import MARKS

LINES = {
    "tasks": "14:13:20.000  0/0     mend/rename-17  mend:train, shell, graded by harbor: tests/test.sh fails.⏎Mend it.",
    "policy.versions": "14:13:20.100  0/0     policy  a.0, weights/a.0, sha256 abababababab",
    "rollout.requests": "14:13:20.200  3/0     demo-e00000-0000-0  eval round 0, mend/rename-17, sample 1 of 1",
    "turns": "14:13:20.600  3/0     demo-e00000-0000-0 #0  +4 -> 3 tokens, a.0: mv a b",
    "trajectories": "14:13:20.800  3/0     demo-e00000-0000-0  submitted, 2 turns, 5 tokens, patch 34 B, 1.50 s",
    "rewards": "14:13:20.900  3/0     demo-e00000-0000-0  score 1 by harbor, 0.20 s: 1 passed",
    "batches": "14:13:24.300  3/0     demo-t000001  1 failed, 3 packed; rewards 0 1 - 1; 75 tree / 120 flat tokens",
    "train.steps": "14:13:24.800  0/0     step 1 (a)  1 group, 2 trained, 1 stale, loss -0.010, clipped 0.050",
    "ledger": "14:13:22.600  3/0     demo-t000001-0  requested, says sampler",
}


@pytest.mark.parametrize("topic", LINES)
def test_the_first_record_of_each_topic_as_a_line(small_run: FabricatedRun, topic: str) -> None:
    first = next(one for one in small_run.delivered() if one.position.topic == topic)
    assert tail.line(first) == LINES[topic]


def test_every_record_gives_one_line_and_one_line_of_json(small_run: FabricatedRun) -> None:
    for delivered in small_run.delivered():
        assert "\n" not in tail.line(delivered)
        told = json.loads(tail.json_line(delivered))
        assert (told["topic"], told["partition"], told["offset"]) == tuple(delivered.position)
        assert told["value"]["run"] == "demo"


def test_json_shows_token_arrays_as_numbers(small_run: FabricatedRun) -> None:
    turn = next(one for one in small_run.delivered() if one.position.topic == "turns")
    value = json.loads(tail.json_line(turn))["value"]
    assert (value["prompt_ids"], value["sampled_ids"]) == ([1, 2, 3, 4], [10, 11, 2])
    assert value["logprobs"] == [-0.5] * 3
    trajectory = next(one for one in small_run.delivered() if one.position.topic == "trajectories")
    value = json.loads(tail.json_line(trajectory))["value"]
    assert value["patch"].startswith("--- a/x\n")
    assert value["turns"][1]["sampled_ids"] == [12, 2]


@pytest.mark.parametrize("side", MARKS)
def test_what_became_of_a_session_is_no_turn(side: str) -> None:
    asked = fab.request("demo-t000001", 0, 1)
    assert tail.describe(turn(asked, [], [], index=-1, side=side)) == f"demo-t000001-0  {MARKS[side]}"


def test_bytes_that_are_no_record_are_shown_as_such() -> None:
    garbage = Delivered(Position("turns", 3, 7), None, b"\xc1", {"record": b"Turn/1"}, 1_790_000_000_000)
    assert "unreadable: turns[3]@7: not a Turn/1" in tail.line(garbage)
    assert "not a Turn/1" in json.loads(tail.json_line(garbage))["error"]


def test_rollouts_of_a_batch_and_of_a_step(small_run: FabricatedRun) -> None:
    step = next(record for record, _ in small_run.records if type(record).__name__ == "TrainStep")
    assert tail.rollouts_of(step) == ("demo-t000001-0", "demo-t000001-1", "demo-t000001-3")
    batch = next(record for record, _ in small_run.records if type(record).__name__ == "PackedBatch")
    assert tail.rollouts_of(batch) == tuple(f"demo-t000001-{i}" for i in range(4))
    assert tail.rollouts_of(fab.task()) == ()
