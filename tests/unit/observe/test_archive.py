"""Topics to Parquet and back, over restarts and over two logs."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pyarrow as pa
import pytest

from kat_stream.archive import ArchiveWriter, GroupFilter, claimed, read_archive, read_rows
from kat_stream.archive import writer as writing
from kat_stream.archive.columns import record_columns
from kat_stream.errors import ArchiveInUse, DataError
from kat_stream.log.base import Delivered, Position
from kat_stream.log.message import seal
from tests.observe_kit import START_MS, FabricatedRun, request, turns
from topics import CATALOGUE, Record

ORDER = {topic.name: place for place, topic in enumerate(CATALOGUE)}


def sorted_as_read(delivered: list[Delivered]) -> list[Delivered]:
    return sorted(delivered, key=lambda d: (ORDER[d.position.topic], *d.position[1:]))


def read(directory: Path) -> list[Delivered]:
    """What the archive holds, sorted, after a look at the order: topic after topic, offset after offset."""
    found = list(read_archive(directory))
    topics = [ORDER[one.position.topic] for one in found]
    assert topics == sorted(topics)
    last: dict[tuple[str, int], int] = {}
    for topic, partition, offset in (one.position for one in found):
        assert offset > last.get((topic, partition), -1)
        last[topic, partition] = offset
    return sorted_as_read(found)


def archive(directory: Path, delivered: list[Delivered], log_id: str = "") -> list[bool]:
    writer = ArchiveWriter(directory, log_id=log_id)
    taken = [writer.add(one) for one in delivered]
    writer.flush()
    return taken


def message_of(record: Record, offset: int, timestamp_ms: int) -> Delivered:
    sealed = seal(record)
    return Delivered(Position(sealed.topic, 0, offset), sealed.key, sealed.value, dict(sealed.headers), timestamp_ms)


def test_everything_comes_back_in_order(tmp_path: Path, small_run: FabricatedRun) -> None:
    delivered = small_run.delivered()
    archive(tmp_path, delivered)
    assert read(tmp_path) == sorted_as_read(delivered)
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
    assert read(tmp_path) == sorted_as_read(delivered)


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
    assert read(tmp_path) == sorted_as_read(delivered)


def test_files_that_overlap_are_read_once(tmp_path: Path, small_run: FabricatedRun) -> None:
    archive(tmp_path, small_run.delivered())
    for path in list((tmp_path / "rewards").rglob("part-*.parquet")):
        shutil.copy(path, path.with_name(f"part-1-copy{path.suffix}"))
    rewards = [one for one in small_run.delivered() if one.position.topic == "rewards"]
    assert len(list(read_archive(tmp_path, ["rewards"]))) == len(rewards)


def test_a_new_in_memory_log_begins_again_at_0_and_both_halves_stay(tmp_path: Path, small_run: FabricatedRun) -> None:
    delivered = small_run.delivered()
    archive(tmp_path, delivered, "first process")
    assert all(archive(tmp_path, delivered, "second process"))
    assert len(list(read_archive(tmp_path))) == 2 * len(delivered)
    assert not any(archive(tmp_path, delivered, "second process"))


def test_bytes_that_are_no_record_are_kept(tmp_path: Path) -> None:
    headers = {"record": b"Turn/99", "retry": b"\xff\x00"}
    garbage = Delivered(Position("turns", 3, 0), None, b"\xc1\x00garbage", headers, 1_790_000_000_000)
    archive(tmp_path, [garbage])
    assert list(read_archive(tmp_path)) == [garbage]
    (row,) = read_rows(tmp_path, "turns", ["record", "rollout_id", "sampled_ids", "spans"])
    assert row == {"run": "", "record": "Turn/99", "rollout_id": None, "sampled_ids": None, "spans": None}


def test_a_number_that_no_column_holds_costs_its_field_and_nothing_else(tmp_path: Path) -> None:
    asked = request("demo-t000001", 0, 1)
    good, odd = turns(asked)
    records = [good, msgspec.structs.replace(odd, index=2**63), msgspec.structs.replace(odd, prefix_len=2**64 - 1)]
    messages = [message_of(record, offset, START_MS) for offset, record in enumerate(records)]
    archive(tmp_path, messages)
    assert list(read_archive(tmp_path)) == messages
    rows = list(read_rows(tmp_path, "turns", ["index", "prefix_len", "finish_reason"]))
    assert [(row["index"], row["prefix_len"], row["finish_reason"]) for row in rows] == [
        (0, 0, "stop"),
        (None, 7, "stop"),
        (1, None, "stop"),
    ]


def test_a_clock_outside_the_calendar_stops_nothing(tmp_path: Path) -> None:
    (turn, _) = turns(request("demo-t000001", 0, 1))
    clocks = (-(2**62), -1, START_MS, 253_402_300_800_000, 2**62)
    messages = [message_of(turn, offset, clock) for offset, clock in enumerate(clocks)]
    archive(tmp_path, messages)
    assert read(tmp_path) == messages
    days = {path.name for path in (tmp_path / "turns" / "run=demo").iterdir()}
    assert days == {"day=0001-01-01", "day=1969-12-31", "day=2026-09-21", "day=9999-12-31"}


def test_columns_can_be_queried_without_decoding(tmp_path: Path, small_run: FabricatedRun) -> None:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    archive(tmp_path, small_run.delivered())
    table = pq.read_table(tmp_path / "trajectories", columns=["run", "day", "record", "rollout_id"])
    wanted = small_run.by_fate["trained"][0]
    (row,) = table.filter(pc.equal(table["rollout_id"], wanted)).to_pylist()
    assert row == {"run": "demo", "day": "2026-09-21", "record": "Trajectory/1", "rollout_id": wanted}


def test_a_temporary_file_of_a_crash_is_ignored(tmp_path: Path, small_run: FabricatedRun) -> None:
    archive(tmp_path, small_run.delivered())
    (folder,) = (tmp_path / "turns").glob("run=*/day=*")
    (folder / ".part-1-x.parquet.tmp").write_bytes(b"PAR1")
    assert len(list(read_archive(tmp_path))) == len(small_run.delivered())
    ArchiveWriter(tmp_path)
    assert not list(folder.glob(".part*"))


def test_a_foreign_file_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "turns" / "run=demo" / "day=2026-01-01"
    folder.mkdir(parents=True)
    (folder / "part-1-x.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match=r"part-1-x\.parquet: no archive of a topic"):
        list(read_archive(tmp_path))


def test_an_archive_of_the_first_release_is_refused_not_overlooked(tmp_path: Path) -> None:
    (tmp_path / "turns").mkdir()
    (tmp_path / "turns" / "part-1-x.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"part-1-x\.parquet: an archive of kat-stream 0\.1\.0"):
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
    again = ArchiveWriter(tmp_path / "b", run="other")
    assert again.next_offsets() == ours.next_offsets()


def test_many_small_files_become_few_and_say_the_same(tmp_path: Path, small_run: FabricatedRun) -> None:
    delivered = [one for one in small_run.delivered() if one.position.topic in ("rewards", "policy.versions")]
    writer = ArchiveWriter(tmp_path)
    for one in delivered:
        writer.add(one)
        writer.flush()
        writer.merge()
        assert list(read_archive(tmp_path, [one.position.topic]))[-1].position.topic == one.position.topic
    assert max(len(list(path.rglob("*.parquet"))) for path in tmp_path.iterdir() if path.is_dir()) < 16
    assert read(tmp_path) == sorted_as_read(delivered)
    writer.merge(all_small=True)
    assert {len(list(path.rglob("*.parquet"))) for path in tmp_path.iterdir() if path.is_dir()} == {1}
    assert read(tmp_path) == sorted_as_read(delivered)
    assert ArchiveWriter(tmp_path).next_offsets() == writer.next_offsets()


def test_a_merge_takes_the_memory_of_a_part_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """How much an archiver takes must not grow with the sizes of what it merges, which grow for hours."""
    monkeypatch.setattr(writing, "MERGE_BYTES", 1 << 20)
    writer, partitions, size = ArchiveWriter(tmp_path, run="demo"), 8, 1 << 17
    messages = [
        Delivered(Position("turns", number, offset), None, random.Random(size * number + offset).randbytes(size), {}, 1)
        for offset in range(16)
        for number in range(partitions)
    ]
    for at, one in enumerate(messages, 1):
        writer.add(one)
        if at % (2 * partitions) == 0:
            writer.flush()
    before, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.system_memory_pool())
    pa.set_memory_pool(pool)
    try:
        writer.merge(all_small=True)
    finally:
        pa.set_memory_pool(before)
    assert pool.max_memory() < len(messages) * size // 2
    assert len(list(tmp_path.rglob("*.parquet"))) == 1
    assert list(read_archive(tmp_path)) == sorted(messages, key=lambda one: one.position)


def test_files_are_as_large_as_their_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its file, what compresses to nothing would be merged until a partition was more than an array holds."""
    monkeypatch.setattr(writing, "SIZES", (64 << 10, 128 << 10, 256 << 10))
    writer = ArchiveWriter(tmp_path)
    for offset in range(3 * writing.MERGE_AT):
        writer.add(Delivered(Position("turns", 0, offset), None, bytes(256 << 10), {}, 1))
        (path,) = writer.flush()
        assert path.stat().st_size < 64 << 10
    assert writer.merge() == 0


FLUSHES = """
import random, sys
from pathlib import Path
from kat_stream.archive import ArchiveWriter
from kat_stream.log.base import Delivered, Position

def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) // 1024

writer, rng, offset = ArchiveWriter(Path(sys.argv[1]), run="demo"), random.Random(0), 0
for size in (100, 4096, 8192, 16384):  # the first loads code and what every archiver has
    for _ in range(4000):
        writer.add(Delivered(Position("turns", 0, offset), None, rng.randbytes(size), {}, 1))
        offset += 1
    writer.flush()
    first = resident() if size == 100 else first
print(resident() - first)
"""
"""Flushes of 16, 32 and 64 MB; prints by how many MiB the process has grown then."""


def test_a_flush_leaves_nothing_of_it_resident(tmp_path: Path) -> None:
    """What is kept of flushes is what merges would lie scattered in: an archiver grew for hours by it."""
    done = subprocess.run([sys.executable, "-c", FLUSHES, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert int(done.stdout) < 8, done.stderr


def test_a_clock_that_jumps_over_midnight_disorders_nothing(tmp_path: Path) -> None:
    """Messages of one partition in turn on two days: two files of one flush, read as one sequence."""
    day_ms = 86_400_000
    messages = [
        Delivered(Position("turns", 0, offset), None, b"x", {}, 1_790_000_000_000 + day_ms * (offset % 2))
        for offset in range(40)
    ]
    writer = ArchiveWriter(tmp_path, run="demo")
    for one in messages:
        writer.add(one)
        if one.position.offset % 4 == 3:
            writer.flush()
            writer.merge()
    assert list(read_archive(tmp_path)) == messages
    assert len(list((tmp_path / "turns" / "run=demo").iterdir())) == 2


def test_one_group_is_found_by_its_columns(tmp_path: Path, small_run: FabricatedRun) -> None:
    delivered = small_run.delivered()
    archive(tmp_path, delivered)
    found = list(read_archive(tmp_path, ["turns", "trajectories", "train.steps"], GroupFilter("demo-t000002")))
    assert {one.position.topic for one in found} == {"turns", "trajectories", "train.steps"}
    groups = {getattr(one.record(), "group_id", "demo-t000002") for one in found}
    assert groups == {"demo-t000002"}
    assert sum(one.position.topic == "trajectories" for one in found) == 4


def test_a_second_archiver_of_the_same_folder_is_refused(tmp_path: Path) -> None:
    busy = pytest.raises(ArchiveInUse, match=r"another archiver writes here \(pid \d+")
    with claimed(tmp_path), busy, claimed(tmp_path, deadline_s=0.3):
        raise AssertionError("two at once")
    with claimed(tmp_path, deadline_s=0.3):
        assert (tmp_path / ".lock").exists()


def test_a_lost_commit_file_costs_nothing_but_the_memory_of_other_runs(
    tmp_path: Path, small_run: FabricatedRun
) -> None:
    archive(tmp_path, small_run.delivered())
    (tmp_path / "_commit.json").unlink()
    assert not any(archive(tmp_path, small_run.delivered()))


def test_every_record_has_columns_and_every_field_is_one() -> None:
    for topic in CATALOGUE:
        fields = {field for field, _ in record_columns(topic.record).values()}
        assert fields == set(topic.record.__struct_fields__) - {"run"}
