"""Runs the command line as a user does, in processes of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.conftest_kafka import kafka_bootstrap

__all__ = ["kafka_bootstrap"]
ROOT = Path(__file__).parents[2]
DEMO = ROOT / "kat_stream" / "demo" / "demo.toml"
SMALL = {
    "run.steps": "2",
    "sampler.groups_per_step": "3",
    "sampler.group_size": "4",
    "data.held_out": "'mend:held-out?count=8&seed=0'",
    "data.train": "'mend:train?count=50&seed=0'",
    "trainer.checkpoint_every": "1",
}


def settings(directory: Path, **changes: str) -> list[str]:
    """`--set` arguments of a run of seconds, in a directory of its own."""
    table = {**SMALL, "run.directory": f"'{directory}'", **{key.replace("__", "."): v for key, v in changes.items()}}
    return [word for key, value in table.items() for word in ("--set", f"{key}={value}")]


def kat(*arguments: str | Path, deadline_s: float = 240) -> subprocess.CompletedProcess[str]:
    """One command to its end."""
    command = [sys.executable, "-m", "kat_stream.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=deadline_s, cwd=ROOT)


def start(*arguments: str | Path, out: Path) -> subprocess.Popen[bytes]:
    """A command in the background, in a session of its own."""
    command = [sys.executable, "-m", "kat_stream.cli", *map(str, arguments)]
    return subprocess.Popen(command, stdout=out.open("wb"), stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True)


def wait_for(what: str, ready: Callable[[], bool], deadline_s: float = 120.0) -> float:
    """Seconds until `ready`; fails loudly with what was awaited."""
    began = time.monotonic()
    while not ready():
        assert time.monotonic() - began < deadline_s, f"{what}: not within {deadline_s} s"
        time.sleep(0.05)
    return time.monotonic() - began


def end(process: subprocess.Popen[bytes]) -> None:
    """No process outlives its test."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
