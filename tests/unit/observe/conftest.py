"""A fabricated run for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from kat_stream.archive import ArchiveWriter
from kat_stream.config import Config, dump
from tests.observe_kit import FabricatedRun, small


@pytest.fixture
def small_run() -> FabricatedRun:
    return small()


@pytest.fixture
def run_dir(tmp_path: Path, small_run: FabricatedRun, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run on the in-memory log, in the folder where `latest` looks."""
    directory = tmp_path / "runs" / "demo"
    directory.mkdir(parents=True)
    config = Config()
    (directory / "config.toml").write_text(
        dump(msgspec.structs.replace(config, run=msgspec.structs.replace(config.run, name="demo")))
    )
    writer = ArchiveWriter(directory / "archive")
    for delivered in small_run.delivered():
        writer.add(delivered)
    writer.flush()
    monkeypatch.chdir(tmp_path)
    return directory
