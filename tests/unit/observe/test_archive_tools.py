"""pandas, datasets and duckdb read an archive without our code."""

from __future__ import annotations

from pathlib import Path

import pytest

from kat_stream.archive import ArchiveWriter
from tests.observe_kit import RUN, FabricatedRun


@pytest.fixture
def archive(tmp_path: Path, small_run: FabricatedRun) -> Path:
    writer = ArchiveWriter(tmp_path, run=RUN)
    for one in small_run.delivered():
        writer.add(one)
    writer.flush()
    return tmp_path


def test_pandas(archive: Path, small_run: FabricatedRun) -> None:
    import pandas as pd

    turns = pd.read_parquet(archive / "turns")
    assert turns["run"].unique().tolist() == [RUN]
    assert turns.sort_values(["timestamp", "index"])["sampled_ids"].iloc[0].tolist() == [10, 11, 2]
    assert turns["logprobs"].iloc[0].dtype == "float32"
    rewards = pd.read_parquet(archive / "rewards", filters=[("purpose", "==", "train")])
    graded = rewards[rewards["status"] == "graded"]
    assert graded.groupby("group_id")["score"].mean()["demo-t000003"] == 0.5
    assert str(rewards["timestamp"].dt.tz) == "UTC"


def test_datasets(archive: Path, small_run: FabricatedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    files = str(archive / "trajectories" / "**" / "*.parquet")
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    wanted = small_run.by_fate["trained"][0]
    (one,) = loaded.filter(lambda row: row["rollout_id"] == wanted)
    assert [turn["sampled_ids"] for turn in one["turns"]] == [[10, 11, 2], [12, 2]]
    assert one["request"]["task"]["task_id"] == "mend/rename-17"


def test_duckdb(archive: Path, small_run: FabricatedRun) -> None:
    import duckdb

    def rows(query: str, topic: str) -> list[tuple[object, ...]]:
        files = f"read_parquet('{archive}/{topic}/**/*.parquet', hive_partitioning = true)"
        return duckdb.connect().execute(query.format(files)).fetchall()

    ((run, count),) = rows("select run, count(*) from {} group by run", "turns")
    assert (run, count) == (RUN, sum(one.position.topic == "turns" for one in small_run.delivered()))
    trained = rows("select unnest(trained) as id from {} order by id", "train.steps")
    assert [one for (one,) in trained] == sorted(small_run.by_fate["trained"])
    fates = rows("select m.fate, count(*) from (select unnest(members) as m from {}) group by 1 order by 1", "batches")
    assert dict(fates)["packed"] == 5
    ((loss,),) = rows(
        "select list_filter(metrics, lambda m: m.key = 'loss')[1].value from {} where step = 2", "train.steps"
    )
    assert loss == pytest.approx(-0.02)
