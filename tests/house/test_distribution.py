"""The suite in several processes: a file stays in one, so that its fixtures are made once and its order holds."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.conftest import SHARED

TESTS = Path(__file__).parents[1]
FILES = ("tests/unit/test_mix.py", "tests/unit/test_routing.py")


def test_each_file_is_run_by_one_process() -> None:
    command = [sys.executable, "-m", "pytest", "-vv", "-n", "2", *FILES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=TESTS.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    ran = set(re.findall(r"\[(gw\d)\].*PASSED (tests/unit/\w+\.py)", done.stdout))
    assert sorted(file for _, file in ran) == sorted(FILES), done.stdout


def test_the_files_that_share_a_fixture_are_those_that_ask_for_it() -> None:
    texts = {path.name: path.read_text() for path in TESTS.rglob("test_*.py") if path != Path(__file__)}
    for fixture, files in SHARED.items():
        asks = re.compile(rf"def test_\w+\([^)]*\b{fixture.removesuffix('_dir')}(_dir)?: ")
        assert sorted(name for name, text in texts.items() if asks.search(text)) == sorted(files)
