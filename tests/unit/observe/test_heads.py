"""What the account takes of a record is the same from columns and from bytes, whichever build wrote the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from kat_stream.archive import ArchiveWriter, read_archive, read_rows
from kat_stream.archive import writer as writing
from kat_stream.archive.columns import table_of
from kat_stream.log.base import Delivered, Position
from kat_stream.observe.heads import HEADS, columns_of, head_of, head_of_row
from tests.observe_kit import FabricatedRun


def heads_by_columns(directory: Path, topic: str) -> list[object]:
    return [head_of_row(topic, row) for row in read_rows(directory, topic, columns_of(topic))]


@pytest.mark.parametrize("topic", HEADS)
def test_columns_and_bytes_give_the_same_head(tmp_path: Path, small_run: FabricatedRun, topic: str) -> None:
    writer = ArchiveWriter(tmp_path, run="demo")
    for one in small_run.delivered():
        writer.add(one)
    writer.flush()
    by_bytes = [head_of(delivered) for delivered in read_archive(tmp_path, [topic])]
    assert by_bytes and heads_by_columns(tmp_path, topic) == by_bytes


@pytest.mark.parametrize("merged", [False, True])
def test_rows_of_a_build_without_a_column_keep_their_head(
    tmp_path: Path, small_run: FabricatedRun, monkeypatch: pytest.MonkeyPatch, merged: bool
) -> None:
    """A merge of old and new files gives the old rows nulls where the new ones have a value."""
    steps = [one for one in small_run.delivered() if one.position.topic == "train.steps"]
    writer = ArchiveWriter(tmp_path, run="demo")
    with monkeypatch.context() as older:
        older.setattr(writing, "table_of", lambda messages: table_of(messages).drop_columns(["checkpoint", "batches"]))
        writer.add(steps[0])
        writer.flush()
    for one in steps[1:]:
        writer.add(one)
    writer.flush()
    assert bool(writer.merge(all_small=True) if merged else 0) == merged
    assert heads_by_columns(tmp_path, "train.steps") == [head_of(one) for one in steps]


@pytest.mark.parametrize("topic", HEADS)
def test_bytes_that_are_no_record_have_no_head(tmp_path: Path, topic: str) -> None:
    writer = ArchiveWriter(tmp_path, run="demo")
    writer.add(Delivered(Position(topic, 0, 0), None, b"\xc1", {"record": b"Turn/99"}, 1_790_000_000_000))
    writer.flush()
    assert heads_by_columns(tmp_path, topic) == [None]
