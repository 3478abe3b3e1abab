"""Topics to Parquet and back, over restarts and over two logs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kat_stream.archive import ArchiveWriter, read_archive
from kat_stream.errors import DataError
from kat_stream.log.base import Delivered, Position
from tests.observe_kit import FabricatedRun
from topics import CATALOGUE

ORDER = {topic.name: place for place, topic in enumerate(CATALOGUE)}


def sorted_as_read(delivered: list[Delivered]) -> list[Delivered]:
    return sorted(delivered, key=lambda d: (ORDER[d.position.topic], *d.position[1:]))


def bare(delivered: Delivered) -> Delivered:
    """As the archive gives it back: of the headers it keeps the record's name."""
    headers = {"record": delivered.headers["record"]} if "record" in delivered.headers else {}
    return Delivered(delivered.position, delivered.key, delivered.value, headers, delivered.timestamp_ms)


def archive(directory: Path, delivered: list[Delivered], log_id: str = "") -> list[bool]:
    writer = ArchiveWriter(directory, log_id=log_id)
    taken = [writer.add(one) for one in delivered]
    writer.flush()
    return taken


def test_everything_comes_back_in_order(tmp_path: Path, small_run: FabricatedRun) -> None:
    delivered = small_run.delivered()
    archive(tmp_path, delivered)
    assert list(read_archive(tmp_path)) == sorted_as_read([bare(one) for one in delivered])
    assert [one.position.topic for one in read_archive(tmp_path, ["rewards"])] == ["rewards"] * sum(
        one.position.topic == "rewards" for one in delivered
    )


def test_a_restart_adds_nothing_twice_and_goes_on(tmp_path: Path, small_run: FabricatedRun) -> None:
    delivered = small_run.delivered()
    half = len(delivered) // 2
    assert all(archive(tmp_path, delivered[:half]))
    writer = ArchiveWriter(tmp_path)
    after: dict[tuple[str, int], int] = {}
    for topic, partition, offset in (one.position for one in delivered[:half]):
        after[topic, partition] = offset + 1
    assert writer.next_offsets() == after
    assert [writer.add(one) for one in delivered] == [False] * half + [True] * (len(delivered) - half)
    writer.flush()
    assert list(read_archive(tmp_path)) == sorted_as_read([bare(one) for one in delivered])


def test_what_was_not_flushed_is_added_again_after_a_crash(tmp_path: Path, small_run: FabricatedRun) -> None:
    delivered = small_run.delivered()
    writer = ArchiveWriter(tmp_path)
    for one in delivered[:20]:
        writer.add(one)
    writer.flush()
    for one in delivered[20:]:
        writer.add(one)
    del writer
    archive(tmp_path, delivered)
    assert list(read_archive(tmp_path)) == sorted_as_read([bare(one) for one in delivered])


def test_files_that_overlap_are_read_once(tmp_path: Path, small_run: FabricatedRun) -> None:
    archive(tmp_path, small_run.delivered())
    for path in list((tmp_path / "rewards").iterdir()):
        shutil.copy(path, path.with_name(f"part-0-copy{path.suffix}"))
    rewards = [one for one in small_run.delivered() if one.position.topic == "rewards"]
    assert len(list(read_archive(tmp_path, ["rewards"]))) == len(rewards)


def test_a_new_in_memory_log_begins_again_at_0_and_both_halves_stay(tmp_path: Path, small_run: FabricatedRun) -> None:
    delivered = small_run.delivered()
    archive(tmp_path, delivered, "first process")
    assert all(archive(tmp_path, delivered, "second process"))
    assert len(list(read_archive(tmp_path))) == 2 * len(delivered)
    assert not any(archive(tmp_path, delivered, "second process"))


def test_bytes_that_are_no_record_are_kept(tmp_path: Path) -> None:
    garbage = Delivered(Position("turns", 3, 0), None, b"\xc1\x00garbage", {}, 1_790_000_000_000)
    archive(tmp_path, [garbage])
    assert list(read_archive(tmp_path)) == [garbage]


def test_columns_can_be_queried_without_decoding(tmp_path: Path, small_run: FabricatedRun) -> None:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    archive(tmp_path, small_run.delivered())
    table = pq.read_table(tmp_path / "trajectories", columns=["run", "record", "rollout_id"])
    wanted = small_run.by_fate["trained"][0]
    (row,) = table.filter(pc.equal(table["rollout_id"], wanted)).to_pylist()
    assert row == {"run": "demo", "record": "Trajectory/1", "rollout_id": wanted}


def test_a_temporary_file_of_a_crash_is_ignored(tmp_path: Path, small_run: FabricatedRun) -> None:
    archive(tmp_path, small_run.delivered())
    (tmp_path / "turns" / ".part-1-x.parquet.tmp").write_bytes(b"PAR1")
    assert len(list(read_archive(tmp_path))) == len(small_run.delivered())


def test_a_foreign_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "turns").mkdir()
    (tmp_path / "turns" / "part-1-x.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match=r"part-1-x\.parquet: no archive of a topic"):
        list(read_archive(tmp_path))


def test_a_failed_flush_loses_nothing(tmp_path: Path, small_run: FabricatedRun) -> None:
    writer = ArchiveWriter(tmp_path / "archive")
    (tmp_path / "archive").write_text("a file where the folder should be")
    for one in small_run.delivered():
        writer.add(one)
    with pytest.raises(OSError, match="archive"):
        writer.flush()
    (tmp_path / "archive").unlink()
    writer.flush()
    assert len(list(read_archive(tmp_path / "archive"))) == len(small_run.delivered())


def test_records_of_another_run_on_the_same_log_are_left_out(tmp_path: Path, small_run: FabricatedRun) -> None:
    delivered = small_run.delivered()
    ours, theirs = ArchiveWriter(tmp_path / "a", run="demo"), ArchiveWriter(tmp_path / "b", run="other")
    assert [ours.add(one) for one in delivered] == [True] * len(delivered)
    assert [theirs.add(one) for one in delivered] == [False] * len(delivered)
    assert theirs.flush() == []
