"""The contract of the bubblewrap back end once more, as an ordinary user of a laptop would run it: no root, no cgroups.

Owns nothing: it runs the contract's files and most of test_sandbox_hostile.py in a process without privileges, to
which our interpreter is shown in a private mount namespace (it may live in /root).
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest

from tests.contract.sandbox_kit import needs_bwrap

ROOT = Path(__file__).parents[2]
USER = "12001"
DEADLINE_S = 220  # a busy machine takes five times as long as an idle one

pytestmark = [
    pytest.mark.timeout(DEADLINE_S + 20),
    needs_bwrap,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user; who is one has run it already"),
]
FILES = ("test_sandboxes", "test_sandbox_files", "test_sandbox_life", "test_sandbox_hostile")
# Dropped: what needs cgroups, and what the view of the file system decides for every user alike.
SELECTED = "not local and not memory_hog and not cpu_is_shared and not hosts_files and not full_disk and not wrong_spec"


def test_everything_holds_for_an_ordinary_user() -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as place:
        home = Path(place)
        home.chmod(0o755)
        (home / "python").mkdir()
        (home / "home").mkdir(mode=0o777)
        (home / "home").chmod(0o777)
        packages = f"{ROOT}:{sysconfig.get_path('purelib')}"
        tests = " ".join(f"tests/contract/{name}.py" for name in FILES)
        script = (
            f"mount --bind '{sys.base_prefix}' '{home}/python' && cd '{ROOT}' && exec setpriv --reuid {USER} "
            f"--regid {USER} --clear-groups env -i PATH=/usr/bin:/bin:/usr/sbin HOME='{home}/home' "
            f"PYTHONPATH='{packages}' LD_LIBRARY_PATH='{home}/python/lib' "
            f"PYTHONDONTWRITEBYTECODE=1 '{home}/python/bin/python3.12' -m pytest -q -x -p no:cacheprovider "
            f"--basetemp '{home}/home/t' -k '{SELECTED}' {tests}"
        )
        command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script]
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert done.stdout.count(".") > 50, "most of the tests were not selected"
