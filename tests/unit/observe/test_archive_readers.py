"""Readers of an archive that its writer changes meanwhile, and of one with many files."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from kat_stream.archive import ArchiveWriter, GroupFilter, archived_positions, parts, read_archive, read_rows, reader
from kat_stream.archive import writer as writing
from kat_stream.errors import DataError
from kat_stream.log.base import Delivered
from tests.observe_kit import FabricatedRun

TOPIC = "rewards"


@pytest.fixture
def rewards(small_run: FabricatedRun) -> list[Delivered]:
    return sorted((one for one in small_run.delivered() if one.position.topic == TOPIC), key=lambda one: one.position)


def filled(directory: Path, messages: list[Delivered]) -> ArchiveWriter:
    """A file a message."""
    writer = ArchiveWriter(directory)
    for one in messages:
        writer.add(one)
        writer.flush()
    return writer


def ids_of(messages: list[Delivered]) -> list[str]:
    return sorted(one.record().rollout_id for one in messages)  # type: ignore[attr-defined]


def open_files(directory: Path) -> int:
    """Parquet files of an archive that this process has open."""
    found = 0
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the descriptor of this look itself
            found += link.readlink().is_relative_to(directory) and ".parquet" in link.readlink().name
    return found


def test_a_merge_that_ends_between_the_list_and_the_look_hides_nothing(
    tmp_path: Path, rewards: list[Delivered], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit is read, names are listed, and only then the merged file gets its name."""
    writer, finish, named = filled(tmp_path, rewards), writing.finish, parts.named
    unfinished: list[tuple[Path, parts.Commit]] = []
    monkeypatch.setattr(writing, "finish", lambda *change: unfinished.append(change))
    writer.merge(all_small=True)

    def listed_just_before(directory: Path, topic: str) -> set[Path]:
        found = named(directory, topic)
        if unfinished:
            finish(*unfinished.pop())
        return found

    monkeypatch.setattr(parts, "named", listed_just_before)
    (change,) = unfinished
    assert change[1].remove
    assert list(read_archive(tmp_path, [TOPIC])) == rewards
    assert not unfinished


def test_a_reader_looks_again_where_files_were_merged_after_it_listed_them(
    tmp_path: Path, rewards: list[Delivered], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process's `ledger` on a run that is live."""
    writer, describe, merged = filled(tmp_path, rewards), parts.describe, iter([True])

    def merged_meanwhile(path: Path) -> parts.Part:
        if next(merged, False):
            writer.merge(all_small=True)
        return describe(path)

    monkeypatch.setattr(parts, "describe", merged_meanwhile)
    (part,) = parts.parts(tmp_path, TOPIC)
    assert part.path.exists()
    assert next(merged, None) is None


@pytest.mark.parametrize("read", range(1, 6))
def test_a_merge_under_a_reader_costs_no_message_and_repeats_none(
    tmp_path: Path, rewards: list[Delivered], read: int
) -> None:
    writer = filled(tmp_path, rewards)
    messages = read_archive(tmp_path, [TOPIC])
    found = [next(messages) for _ in range(read)]
    writer.merge(all_small=True)
    assert found + list(messages) == rewards


def test_a_merge_under_a_reader_of_one_group_repeats_nothing(tmp_path: Path, rewards: list[Delivered]) -> None:
    group = "demo-t000001"
    wanted = [one for one in rewards if one.record().group_id == group]  # type: ignore[attr-defined]
    writer = filled(tmp_path, rewards)
    messages = read_archive(tmp_path, [TOPIC], GroupFilter(group))
    found = [next(messages)]
    writer.merge(all_small=True)
    assert found + list(messages) == wanted
    assert len(wanted) > 1


def test_a_merge_under_a_reader_of_columns_costs_no_row(tmp_path: Path, rewards: list[Delivered]) -> None:
    writer = filled(tmp_path, rewards)
    rows = read_rows(tmp_path, TOPIC, ["rollout_id"])
    found = [next(rows)]
    writer.merge(all_small=True)
    found += rows
    assert sorted({row["rollout_id"] for row in found}) == ids_of(rewards)


def test_a_reader_has_one_file_open_at_a_time(tmp_path: Path, rewards: list[Delivered]) -> None:
    """Files of many hours are thousands; a process may have 1024 open."""
    filled(tmp_path, rewards)
    for reading in (read_archive(tmp_path, [TOPIC]), read_rows(tmp_path, TOPIC, ["rollout_id"])):
        opened = Counter(open_files(tmp_path) for _ in reading)
        assert opened == {1: len(rewards)}
    assert open_files(tmp_path) == 0


def test_files_that_always_go_away_are_an_error(
    tmp_path: Path, rewards: list[Delivered], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = parts.Part(tmp_path / TOPIC / "run=demo" / "day=2026-01-01" / "part-1-x.parquet", "", {0: (0, 1)}, (1, 1), 0)
    monkeypatch.setattr(reader, "parts", lambda directory, topic: [gone])
    for reading in (read_archive(tmp_path, [TOPIC]), read_rows(tmp_path, TOPIC, [])):
        with pytest.raises(DataError, match="change faster than they can be read"):
            list(reading)


def test_a_file_of_the_last_change_that_is_gone_is_named(tmp_path: Path, rewards: list[Delivered]) -> None:
    filled(tmp_path, rewards)
    lost = max((tmp_path / TOPIC).rglob("part-*.parquet"))
    lost.unlink()
    with pytest.raises(DataError, match=f"the archive has lost a file: .*{lost.name}"):
        list(read_archive(tmp_path, [TOPIC]))


def test_where_an_archive_ends_is_said_without_a_look_at_its_files(
    tmp_path: Path, rewards: list[Delivered], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked every few seconds (lag), and there are thousands of files."""
    writer = filled(tmp_path, rewards)
    with monkeypatch.context() as patch:
        patch.delattr(parts, "describe")
        assert archived_positions(tmp_path, "", [TOPIC]) == writer.next_offsets()
    (tmp_path / "_commit.json").unlink()
    assert archived_positions(tmp_path, "", [TOPIC]) == writer.next_offsets()


def test_a_writer_looks_into_a_file_once(
    tmp_path: Path, rewards: list[Delivered], monkeypatch: pytest.MonkeyPatch
) -> None:
    describe, looked = writing.describe, Counter[Path]()

    def counted(path: Path) -> parts.Part:
        looked[path] += 1
        return describe(path)

    monkeypatch.setattr(writing, "describe", counted)
    writer = ArchiveWriter(tmp_path)
    for one in rewards:
        writer.add(one)
        writer.flush()
        writer.merge()
    assert set(looked.values()) == {1}
    assert len(looked) > len(rewards)
