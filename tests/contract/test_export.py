"""`kat-stream export` on a run's archive: what `datasets` loads, another package's format, bad input."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pyarrow.parquet as pq
import pytest

from kat_stream.archive import ArchiveWriter
from kat_stream.cli import main
from kat_stream.config import Config, dump
from kat_stream.env import plugins
from kat_stream.env.manager import GROUP, Policy, Rules
from kat_stream.env.manager.export import Export, Report, export
from kat_stream.env.manager.parquet import open_rows
from kat_stream.errors import StorageError
from kat_stream.log.base import Delivered, Position
from kat_stream.log.memory import MemoryLog
from kat_stream.log.message import seal
from kat_stream.observe.sources import LogSource
from tests.unit.records import RUN, request, reward, trajectory, turn
from topics import CATALOGUE, Record, Trajectory
from topics.record import ints

PACKAGE = '''
"""Counts."""
class Lengths:
    columns = {"turn_id": "string", "tokens": "int64", "about": "json"}
    def rows(self, rollout, policy):
        for step in rollout.learned():
            yield {"turn_id": step.record.turn_id, "tokens": len(step.ids), "about": {"depth": step.depth}}
FORMAT = Lengths()
'''


def conversation(sample: int, **fields: object) -> Trajectory:
    """A rollout of the demo's policy: told, said; told, said."""
    renderer = Policy("demo").renderer
    asked = request(sample=sample, size=4)
    first = list(ints(renderer.encode("<|system|>Mend.<|end|><|user|>go<|end|><|assistant|>")))
    said = list(ints(renderer.encode("ls<|end|>")))
    second = list(ints(renderer.encode("<|user|>[exit 1]<|end|><|assistant|>")))
    one = msgspec.structs.replace(turn(asked, first, said, name=f"{sample}-0"), content="ls")
    two = msgspec.structs.replace(
        turn(asked, second, said, name=f"{sample}-1"),
        content="ls",
        parent=one.turn_id,
        prefix_len=len(first) + len(said),
        index=1,
    )
    return trajectory(asked, one, two, **fields)


LIVES = (
    (0, "a", "turn_limit"),
    (0, "b", "submitted"),
    (1, "a", "turn_limit"),
    (1, "b", "submitted"),
    (2, "a", "submitted"),
)
"""Sample, life, outcome."""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Scores 1, 0, none (the grader failed), and one that cannot be read; the first was delivered twice."""
    broken = trajectory(request(sample=3, size=4), *conversation(3).turns[1:])
    finished = [conversation(0), conversation(1), conversation(2), broken, conversation(0, outcome="cancelled")]
    rewards = [
        reward(finished[0].request, 1.0),
        reward(finished[1].request, 0.0),
        reward(finished[2].request, 0.0, status="failed"),
        reward(finished[3].request, 1.0),
    ]
    directory = tmp_path / "runs" / RUN
    directory.mkdir(parents=True)
    config = msgspec.structs.replace(Config(), run=msgspec.structs.replace(Config().run, name=RUN))
    (directory / "config.toml").write_text(dump(config))
    writer = ArchiveWriter(directory / "archive")
    for topic, records in (("trajectories", finished), ("rewards", rewards)):
        for offset, record in enumerate(records):
            writer.add(delivered(topic, offset, record))
    writer.flush()
    return directory


def delivered(topic: str, offset: int, record: Record) -> Delivered:
    sealed = seal(record)
    return Delivered(Position(topic, 0, offset), sealed.key, sealed.value, dict(sealed.headers), 1_790_000_000_000)


def loaded(directory: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    return list(datasets.load_dataset(str(directory), split="train", cache_dir=str(directory.parent / "cache")))


@pytest.mark.parametrize(("name", "rows"), [("tree", 3), ("per-turn", 6), ("linear", 3), ("longest-branch", 3)])
def test_datasets_loads_ids(
    name: str, rows: int, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run_dir.parent / "out"
    assert main(["export", str(run_dir), "--format", name, "--out", str(out)]) == 0
    found = loaded(out, monkeypatch)
    assert len(found) == rows and {row["score"] for row in found} == {1.0, 0.0, None}
    if name != "tree":
        said = list(ints(Policy("demo").renderer.encode("ls<|end|>")))
        labels = [[label for label in row["labels"] if label != -100] for row in found]
        assert labels == [said if name == "per-turn" else said * 2] * rows
        assert all(len(row["input_ids"]) == len(row["labels"]) == len(row["logprobs"]) for row in found)
    printed = capsys.readouterr().out
    assert [line.split()[-1] for line in printed.splitlines() if line.startswith("rollouts ")] == ["3", "1"]
    assert "r-t000000-3: turn 3-1: parent '3-0'" in printed


def test_datasets_loads_conversations_of_good_rollouts(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = run_dir.parent / "out"
    words = ["export", str(run_dir), "--format", "sft", "--where", "score>=1", "--out", str(out)]
    assert main(words) == 0
    (row,) = loaded(out, monkeypatch)
    assert row["messages"] == [
        {"role": "system", "content": "Mend."},
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": "ls"},
        {"role": "user", "content": "[exit 1]"},
        {"role": "assistant", "content": "ls"},
    ]
    assert (row["tools"], row["learned"], row["exact"], row["rollout_id"]) == (
        None,
        ["0-0", "0-1"],
        True,
        "r-t000000-0",
    )
    assert main(words) == 1, "an export is never overwritten"


def test_failed_calls_are_dropped(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = run_dir.parent / "out"
    words = ["export", str(run_dir), "--format", "sft", "--drop-failed", "--where", "score=1", "--out", str(out)]
    assert main(words) == 0
    (row,) = loaded(out, monkeypatch)
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
    assert row["learned"] == ["0-1"]


def test_a_format_of_another_package(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed as pip would: a module and its metadata on the path of a fresh process."""
    site = tmp_path / "site"
    about = site / "lengths-1.0.dist-info"
    about.mkdir(parents=True)
    (site / "lengths.py").write_text(PACKAGE)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: lengths\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[kat_stream.formats]\nlengths = lengths:FORMAT\n")
    out = run_dir.parent / "out"
    command = [sys.executable, "-m", "kat_stream.cli", "export", str(run_dir), "--format", "lengths", "--out", str(out)]
    path = os.pathsep.join([str(site), str(Path(__file__).parents[2])])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = loaded(out, monkeypatch)
    assert [row["about"]["depth"] for row in found] == [1, 2] * 3 and found[1]["tokens"] > found[0]["tokens"]


def test_a_log_that_is_still_written_is_exported_as_it_stands(tmp_path: Path) -> None:
    how = Export(plugins.load(GROUP, "linear"), Policy("demo"), Rules())

    async def live() -> Report:
        log = MemoryLog()
        await log.start()
        try:
            await log.apply_topics(CATALOGUE)
            await log.publish(conversation(0), conversation(1), reward(request(sample=0, size=4), 1.0), deadline_s=10)
            return await export(LogSource(log, "memory:", RUN), how, tmp_path / "out")
        finally:
            await log.close()

    report = anyio.run(live)
    assert (report.rows, report.kept, dict(report.fates)) == (2, 4, {"written": 2})
    assert pq.read_table(tmp_path / "out" / "train.parquet")["score"].to_pylist() == [1.0, None]


def test_a_rollout_that_ran_twice_is_written_once_with_the_grade_of_its_own_life(tmp_path: Path) -> None:
    """Sample 0 lost the reward of its first life; of sample 1 the second was graded first; of sample 2 one is gone."""
    how = Export(plugins.load(GROUP, "linear"), Policy("demo"), Rules())
    said = [(0, 1.0, "b"), (1, 1.0, "b"), (1, 0.0, "a"), (2, 1.0, "gone")]
    records = [conversation(sample, life=life, outcome=outcome) for sample, life, outcome in LIVES]
    records += [reward(request(sample=sample, size=4), score, life=life) for sample, score, life in said]

    async def live() -> Report:
        log = MemoryLog()
        await log.start()
        try:
            await log.apply_topics(CATALOGUE)
            await log.publish(*records, deadline_s=10)
            return await export(LogSource(log, "memory:", RUN), how, tmp_path / "out")
        finally:
            await log.close()

    report = anyio.run(live)
    rows = pq.read_table(tmp_path / "out" / "train.parquet").to_pylist()
    found = {(row["rollout_id"], row["outcome"], row["score"]) for row in rows}
    assert report.fates == {"written": 3} and found == {
        (f"{RUN}-t000000-0", "submitted", 1.0),
        (f"{RUN}-t000000-1", "turn_limit", 0.0),
        (f"{RUN}-t000000-2", "submitted", None),
    }


def test_of_two_exports_into_one_folder_the_first_to_end_stays(tmp_path: Path) -> None:
    with (
        pytest.raises(StorageError, match="cannot be written: File exists"),
        open_rows(tmp_path, {"a": "int64"}) as last,
    ):
        last.add({"a": 2})
        with open_rows(tmp_path, {"a": "int64"}) as first:
            first.add({"a": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["train.parquet"]
    assert pq.read_table(tmp_path / "train.parquet").to_pylist() == [{"a": 1}]


def test_where_nothing_matches_no_file_is_written_and_the_next_export_may_have_rows(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run_dir.parent / "out"
    words = ["export", str(run_dir), "--out", str(out), "--where"]
    assert main([*words, "score>1"]) == 1
    printed = capsys.readouterr().out
    assert f"{out}/train.parquet: not written" in printed and "other than asked" in printed
    assert list(out.iterdir()) == []
    assert main([*words, "score=1"]) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--format", "sfd"], "did you mean 'sft'"),
        (["--where", "reward>1"], "fields: score"),
        (["--drop-failed", "("], "no regular expression"),
    ],
)
def test_what_cannot_be_asked_is_said(
    words: list[str], said: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run_dir), "--out", str(run_dir.parent / "out"), *words]) == 2
    assert said in capsys.readouterr().err and not (run_dir.parent / "out" / "train.parquet").exists()
