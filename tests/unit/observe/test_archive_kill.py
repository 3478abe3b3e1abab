"""No death at any step of writing or merging loses a message or archives one twice.

The n-th rename, removal or opening of a file for writing does not happen, nor anything after it: an audit hook raises
what no code catches, and the writer is left as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from kat_stream.archive import ArchiveWriter, parts, read_archive
from kat_stream.archive import writer as settings
from kat_stream.log.base import Delivered
from tests.observe_kit import FabricatedRun


class Death(BaseException):
    """As sudden as a kill: no handler in the code is for it."""


class _Fuse:
    """An audit hook cannot be taken away again: this one is armed and disarmed."""

    def __init__(self) -> None:
        self.directory = ""
        self.left = 0

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.directory or event not in ("os.rename", "os.remove", "open"):
            return
        writes = event != "open" or (isinstance(arguments[1], str) and "w" in arguments[1])
        if writes and str(arguments[0]).startswith(self.directory):
            self.left -= 1
            if self.left < 0:
                raise Death

    @contextmanager
    def burning(self, directory: Path, steps: int) -> Iterator[None]:
        self.directory, self.left = str(directory), steps
        try:
            yield
        finally:
            self.directory = ""


FUSE = _Fuse()
sys.addaudithook(FUSE.hook)


def work(directory: Path, messages: list[Delivered]) -> None:
    """Three flushes with merges between."""
    writer = ArchiveWriter(directory)
    third = len(messages) // 3
    for number, one in enumerate(messages, 1):
        writer.add(one)
        if number % third == 0:
            writer.flush()
            writer.merge()
    writer.flush()


def dies(directory: Path, messages: list[Delivered], step: int) -> bool:
    with suppress(Death), FUSE.burning(directory, step):
        work(directory, messages)
        return False
    return True


def by_position(messages: list[Delivered]) -> list[Delivered]:
    return sorted(messages, key=lambda one: one.position)


def test_a_death_at_every_step(tmp_path: Path, small_run: FabricatedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "MERGE_AT", 2)
    topics = ("tasks", "policy.versions", "train.steps")
    messages = [one for one in small_run.delivered() if one.position.topic in topics]
    step = 0
    while dies(tmp_path / str(step), messages, step):
        directory = tmp_path / str(step)
        left = [one.position for one in read_archive(directory)]
        assert len(left) == len(set(left)), f"a reader sees messages twice after a death at step {step}"
        again = ArchiveWriter(directory).next_offsets()
        assert all(again.get(p[:2], 0) > p[2] for p in left), f"would be archived again after a death at step {step}"
        work(directory, messages)
        assert by_position(list(read_archive(directory))) == by_position(messages), f"death at step {step}"
        assert not list(directory.rglob(".part*"))
        step += 1
    assert step > 25


def test_a_disk_that_fails_at_the_moment_of_a_change_loses_nothing(
    tmp_path: Path, small_run: FabricatedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit is in its place and names files: whatever fails from there on, they are not given up."""
    messages = small_run.delivered()
    writer = ArchiveWriter(tmp_path)
    for one in messages[: len(messages) // 2]:
        writer.add(one)
    writer.flush()
    for one in messages[len(messages) // 2 :]:
        writer.add(one)
    sync = parts._sync

    def broken(directory: Path) -> None:
        raise OSError(5, "Input/output error")

    for change in (writer.flush, lambda: writer.merge(all_small=True)):
        monkeypatch.setattr(parts, "_sync", broken)
        with pytest.raises(OSError, match="Input/output"):
            change()
        monkeypatch.setattr(parts, "_sync", sync)
        assert by_position(list(read_archive(tmp_path))) == by_position(messages)
    ArchiveWriter(tmp_path)
    assert by_position(list(read_archive(tmp_path))) == by_position(messages)
