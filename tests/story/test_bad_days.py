"""Trouble on our side is waited for, said, and never becomes a reward."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from kat_stream.observe.sources import archived_ledger, archived_records
from tests.story.conftest import DEMO, end, kat, settings, start, wait_for_word
from tests.waiting import wait_for
from topics import TrainStep, Turn

pytestmark = pytest.mark.timeout(1200)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="environment: mounting a small disk needs root")


@needs_root
def test_a_full_disk_is_waited_for(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "none", disk], check=True, timeout=10)
    out = tmp_path / "out.txt"
    process = start("run", DEMO, *settings(disk, run__name="full"), out=out)
    try:
        wait_for(lambda: any((disk / "full" / "weights").glob("*.0")), "the first weights", 300)
        (disk / "filler").write_bytes(b"x" * (free(disk) - (64 << 10)))
        wait_for_word("cannot be written", process, out)
        (disk / "filler").unlink()
        assert process.wait(600) == 0, out.read_text()
        summary = archived_ledger(disk / "full").summary()
        assert summary.requested == 40 == summary.accounted
        assert sum(summary.in_flight.values()) == 0
    finally:
        end(process)
        subprocess.run(["umount", "-l", disk], check=True, timeout=10)


def free(path: Path) -> int:
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def test_an_engine_that_dies_in_mid_turn_costs_no_rollout(tmp_path: Path) -> None:
    """The engine, a process of its own, is killed with calls in flight and comes back; the run ends well."""
    engine_out = tmp_path / "engine.txt"
    engine = serve_engine(engine_out, port=0)
    try:
        wait_for_word("http://", engine, engine_out)
        url = re.findall(r"http://[\d.:]+\d", engine_out.read_text())[0]
        out = tmp_path / "out.txt"
        run = start("run", DEMO, *settings(tmp_path, run__name="shot", engine__urls=f"['{url}']"), out=out)
        try:
            wait_for(lambda: any((tmp_path / "shot" / "archive" / "turns").rglob("part-*.parquet")), "turns", 300)
            end(engine)
            engine = serve_engine(tmp_path / "engine2.txt", port=int(url.rpartition(":")[2]))
            assert run.wait(600) == 0, out.read_text()
        finally:
            end(run)
    finally:
        end(engine)
    records = [record for record, _ in archived_records(tmp_path / "shot")]
    assert [r.step for r in records if isinstance(r, TrainStep)] == [1, 2]
    assert any(isinstance(record, Turn) for record in records)
    summary = archived_ledger(tmp_path / "shot").summary()
    assert summary.requested == 40 == summary.accounted
    assert summary.failed == {}


def serve_engine(out: Path, port: int) -> subprocess.Popen[bytes]:
    import sys

    model = DEMO.parent / "policy"
    command = [sys.executable, "-m", "kat_stream.engines.embedded", "--model-path", str(model), "--port", str(port)]
    return subprocess.Popen(command, stdout=out.open("wb"), stderr=subprocess.STDOUT, start_new_session=True)


def test_a_policy_that_is_no_model_is_refused_at_once(tmp_path: Path) -> None:
    done = kat("run", DEMO, *settings(tmp_path, policy__model=f"'{tmp_path}'"))
    assert done.returncode == 2
    assert "policy.model" in done.stderr
    assert "config.json" in done.stderr
