"""Faults on a running system, and every rollout accounted for; `make chaos` runs as many as you like."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KINDS = (
    "kill:rollout",
    "kill:packer",
    "kill:gateway",
    "kill:trainer@announced",
    "kill:broker",
    "freeze:verifier",
    "cut:packer",
)
SEED = 20261124
NEEDED = ("java", "mvn", "ip", "ss", "bwrap", "mount")

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(600)]


def test_faults_lose_nothing_and_train_nothing_twice() -> None:
    missing = [command for command in NEEDED if shutil.which(command) is None]
    if missing or os.geteuid():
        pytest.skip(f"environment: a private network needs root; missing: {missing}")
    command = [sys.executable, "-m", "tests.chaos", "--faults", str(len(KINDS)), "--seed", str(SEED), "--kinds", *KINDS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=560, cwd=ROOT)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert f"seed {SEED}" in done.stdout
    closing = rf"^chaos: {len(KINDS)} faults, lost 0, trained twice 0, ledger exact, recovery p50 [\d.]+ p99 [\d.]+ s$"
    assert re.search(closing, done.stdout, re.MULTILINE)
    told = [line.split()[4].rstrip(":") for line in done.stdout.splitlines() if "went on after" in line]
    assert sorted(told) == sorted(KINDS)
