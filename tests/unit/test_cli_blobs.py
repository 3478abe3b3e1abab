"""`kat-stream blobs`: what it says and what it removes, on the folder of a run that has ended."""

from __future__ import annotations

import os
import time
from pathlib import Path

import anyio
import pytest

from kat_stream.archive import ArchiveWriter
from kat_stream.cli.main import main
from kat_stream.config import load
from kat_stream.log import Delivered, Position
from kat_stream.log.blobs import BlobStore
from kat_stream.runs import blobs_url, create_run, registered


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run on the in-memory log with an orphan, a young orphan and a blob that its archive refers to."""
    config, made = create_run(load(None, [f"run.directory='{tmp_path}'", "run.name=one"]))
    store = BlobStore(blobs_url(config, made))
    old, kept = anyio.run(store.put, b"old"), anyio.run(store.put, b"kept")
    two_days_ago = time.time() - 2 * 86400
    for ref in (old, kept):
        os.utime(made / "blobs" / ref.sha256[:2] / ref.sha256, (two_days_ago, two_days_ago))
    anyio.run(store.put, b"young")
    writer = ArchiveWriter(made / "archive", log_id="x")
    writer.add(Delivered(Position("rewards", 0, 0), None, f"see {kept}".encode(), {"record": b"Reward/1"}, 1))
    writer.flush()
    return made


def blobs(run_dir: Path) -> set[bytes]:
    return {path.read_bytes() for path in (run_dir / "blobs").glob("*/*")}


def test_sweep_removes_the_old_orphan_only(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["blobs", "list", "--run", str(run_dir)]) == 0
    listed = capsys.readouterr().out
    assert [line.split(None, 3)[3] for line in listed.splitlines()[1:]].count("yes") == 1
    assert "no, but young" in listed
    assert main(["blobs", "sweep", "--dry-run", "--run", str(run_dir)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 blobs, 3 bytes would go; 2 stay"
    assert blobs(run_dir) == {b"old", b"kept", b"young"}
    assert main(["blobs", "sweep", "--run", str(run_dir)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 blobs, 3 bytes removed; 2 stay"
    assert blobs(run_dir) == {b"kept", b"young"}


@pytest.mark.parametrize(("grace", "said"), [("1m", "at least 15 minutes"), ("soon", "is no time")])
def test_a_grace_period_that_could_hurt_is_refused(
    run_dir: Path, grace: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["blobs", "sweep", "--grace", grace, "--run", str(run_dir)]) == 2
    assert said in capsys.readouterr().err
    assert len(blobs(run_dir)) == 3


def test_a_live_run_in_one_process_is_not_swept(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with registered(run_dir, "run", "http://127.0.0.1:9100/metrics"):
        assert main(["blobs", "sweep", "--run", str(run_dir)]) == 2
    assert "sweep when it has ended" in capsys.readouterr().err
