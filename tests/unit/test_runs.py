"""A run's folder says truly which services live, however many come and go at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kat_stream.config import load
from kat_stream.runs import create_run, registered, targets_file, write_targets

METRICS = "http://127.0.0.1:9100/metrics"
COMES_AND_GOES = """
import sys
from pathlib import Path
from kat_stream.runs import registered
for _ in range(100):
    with registered(Path(sys.argv[1]), sys.argv[2], "http://127.0.0.1:9/metrics"):
        pass
"""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return create_run(load(None, [f"run.directory='{tmp_path}'", "run.name='r'"]))[1]


def targets(run_dir: Path) -> list[str]:
    """Services that Prometheus is told of."""
    return [entry["labels"]["service"] for entry in json.loads(targets_file(run_dir).read_text())]


def test_a_service_is_a_target_while_it_lives(run_dir: Path) -> None:
    with registered(run_dir, "packer", METRICS):
        assert json.loads(targets_file(run_dir).read_text())[0]["targets"] == ["127.0.0.1:9100"]
        with registered(run_dir, "trainer", METRICS):
            assert targets(run_dir) == ["packer", "trainer", "engine-http"]
    assert targets(run_dir) == ["engine-http"]


def test_a_service_that_ends_between_listing_and_reading_is_no_target(run_dir: Path) -> None:
    with registered(run_dir, "packer", METRICS):
        (run_dir / "services" / "ended.json").symlink_to("unlinked")  # is listed and cannot be read
        write_targets(run_dir)
        assert targets(run_dir) == ["packer", "engine-http"]


def test_processes_that_come_and_go_at_once_leave_the_truth(run_dir: Path) -> None:
    with registered(run_dir, "stays", METRICS):
        command = [sys.executable, "-c", COMES_AND_GOES, str(run_dir)]
        others = [subprocess.Popen([*command, f"m{number}"], stderr=subprocess.PIPE, text=True) for number in range(2)]
        for other in others:
            _, said = other.communicate(timeout=120)
            assert other.returncode == 0, said
        assert targets(run_dir) == ["stays", "engine-http"]
