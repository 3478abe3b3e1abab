"""The whole system in one process, read as prose: asked for, run, recorded, graded, packed, trained, published."""

import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from kat_stream.archive import read_archive
from kat_stream.observe.sources import archived_ledger, archived_records
from kat_stream.training.publication import weights_checksum
from kat_stream.trees import turns_of
from tests.story.conftest import DEMO, kat, settings
from topics import PolicyVersion, Record, Reward, RolloutRequest, TrainStep, Trajectory, Turn


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    directory = tmp_path_factory.mktemp("runs")
    done = kat("run", DEMO, *settings(directory, run__name="story"))
    assert done.returncode == 0, done.stdout + done.stderr
    return directory / "story", done.stdout


def records[R: Record](run_dir: Path, kind: type[R]) -> list[R]:
    return [record for record, _ in archived_records(run_dir) if isinstance(record, kind)]


def test_it_closes_with_one_line_and_two_plots(finished: tuple[Path, str]) -> None:
    run_dir, output = finished
    last = output.strip().splitlines()[-1]
    assert re.fullmatch(
        rf"run: held-out pass rate 0\.\d\d -> [01]\.\d\d, 2 steps, 24 rollouts, \d+ s, run {run_dir}", last
    )
    assert (run_dir / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (run_dir / "plot.html").read_text()


def test_every_rollout_has_one_fate(finished: tuple[Path, str]) -> None:
    summary = archived_ledger(finished[0]).summary()
    assert summary.requested == 24 + 2 * 8 == summary.accounted
    assert summary.evaluated == 16
    assert summary.trained > 0
    assert sum(summary.in_flight.values()) == 0
    shown = kat("ledger", finished[0])
    assert shown.returncode == 0
    assert "the account closes: 40 = 40" in shown.stdout


def test_each_request_became_one_trajectory_and_one_reward(finished: tuple[Path, str]) -> None:
    asked = Counter(request.rollout_id for request in records(finished[0], RolloutRequest))
    assert set(asked.values()) == {1}
    assert Counter(t.rollout_id for t in records(finished[0], Trajectory)) == asked
    assert Counter(r.rollout_id for r in records(finished[0], Reward) if r.status == "graded") == asked


def test_a_turn_is_on_the_log_before_its_trajectory_and_says_the_same(finished: tuple[Path, str]) -> None:
    messages = [(m.record(), m.timestamp_ms) for m in read_archive(finished[0] / "archive", ["turns", "trajectories"])]
    turns = {turn.turn_id: (turn, written_ms) for turn, written_ms in messages if isinstance(turn, Turn)}
    told = [(turn, ms) for record, ms in messages if isinstance(record, Trajectory) for turn in record.turns]
    assert {turn.turn_id for turn, _ in told} <= turns.keys() and told
    for turn, told_ms in told:
        recorded, written_ms = turns[turn.turn_id]
        assert recorded == turn
        assert written_ms <= told_ms


def test_what_was_sampled_is_what_is_shown_again(finished: tuple[Path, str]) -> None:
    """Token exactness: each prompt begins with the whole path of the turn before it, sampled ids included."""
    several = [t for t in records(finished[0], Trajectory) if len(t.turns) > 1]
    assert several
    for trajectory in several:
        for before, after in pairwise(turns_of(trajectory.turns)):
            path = [*before.prompt_ids, *before.sampled_ids]
            assert list(after.prompt_ids[: len(path)]) == path


def test_each_step_names_what_it_trained_and_publishes_what_it_made(finished: tuple[Path, str]) -> None:
    steps = records(finished[0], TrainStep)
    assert [step.step for step in steps] == [1, 2]
    trained = [rollout for step in steps for rollout in step.trained]
    assert len(trained) == len(set(trained)) == archived_ledger(finished[0]).summary().trained
    versions = records(finished[0], PolicyVersion)
    assert [version.number for version in versions] == [0, 1, 2]
    assert weights_checksum(Path(versions[-1].path)) == versions[-1].checksum


def test_trace_tells_the_story_of_a_trained_rollout(finished: tuple[Path, str]) -> None:
    rollout = records(finished[0], TrainStep)[0].trained[0]
    told = kat("trace", rollout, "--run", finished[0])
    assert told.returncode == 0, told.stderr
    for word in ("requested", "turn 0", "sampled", "graded", "packed", "trained"):
        assert word in told.stdout
