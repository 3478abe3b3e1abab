"""A run's folder says truly which services live, however many come and go at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kat_stream.config import load
from kat_stream.runs import create_run, registered, seems_live, targets_file, write_targets

METRICS = "http://127.0.0.1:9100/metrics"
COMES_AND_GOES = """
import os, sys
from pathlib import Path
from kat_stream.runs import registered
os.getpid = lambda: 1  # as in containers that share the folder
for _ in range(100):
    with registered(Path(sys.argv[1]), sys.argv[2], "http://127.0.0.1:9/metrics"):
        pass
"""

REGISTERED = """
import sys, time
from pathlib import Path
from kat_stream.runs import registered
with registered(Path(sys.argv[1]), "killed", "http://127.0.0.1:9/metrics"):
    print("registered", flush=True)
    time.sleep(300)
"""
ROUNDS = 50
CREATES = """
import sys
from kat_stream.config import load
from kat_stream.errors import ConfigError
from kat_stream.runs import create_run
print("ready", flush=True)
sys.stdin.read()
for number in range(int(sys.argv[2])):
    try:
        create_run(load(None, [f"run.directory='{sys.argv[1]}'", f"run.name=r{number}"]))
        print("made")
    except ConfigError:
        print("refused")
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


def test_of_two_runs_of_one_name_one_is_refused(tmp_path: Path) -> None:
    """At the same moment, too: each has looked, and nobody was there."""
    command = [sys.executable, "-c", CREATES, str(tmp_path), str(ROUNDS)]
    both = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [one.stdout.readline() for one in both if one.stdout] == ["ready\n"] * 2
    said = []
    for one in both:
        assert one.stdin is not None
        one.stdin.close()  # go
        one.stdin = None
    for one in both:
        said += one.communicate(timeout=120)[0].split()
    assert sorted(said) == ["made"] * ROUNDS + ["refused"] * ROUNDS


def test_what_was_killed_here_is_neither_alive_nor_a_target(run_dir: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", REGISTERED, str(run_dir)], stdout=subprocess.PIPE)
    assert dead.stdout is not None and dead.stdout.readline() == b"registered\n"
    assert seems_live(run_dir)
    dead.kill()
    dead.wait(60)
    assert not seems_live(run_dir)
    with registered(run_dir, "packer", METRICS):
        assert targets(run_dir) == ["packer", "engine-http"]


def test_processes_that_come_and_go_at_once_leave_the_truth(run_dir: Path) -> None:
    with registered(run_dir, "stays", METRICS):
        command = [sys.executable, "-c", COMES_AND_GOES, str(run_dir)]
        others = [subprocess.Popen([*command, f"m{number}"], stderr=subprocess.PIPE, text=True) for number in range(2)]
        for other in others:
            _, said = other.communicate(timeout=120)
            assert other.returncode == 0, said
        assert targets(run_dir) == ["stays", "engine-http"]
