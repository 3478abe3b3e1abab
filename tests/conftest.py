"""Which tests go together where several processes run the suite (`make test`): one file, or one costly shared run.

xdist 3.8 passes over these marks with pytest 9.2 (it writes the group to an attribute that is not read any more): today
each test is dealt apart, and what a module or a session shares is made by every process that needs it.
"""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
"""Before torch is loaded: its threads that wait for each other leave the cores to the suite's other processes."""

SHARED = ("struck", "kafka_cluster_dir")
"""Session fixtures that cost so much that only one process may make them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        names = getattr(item, "fixturenames", ())
        group = next((name for name in SHARED if name in names), str(item.path))
        item.add_marker(pytest.mark.xdist_group(group))
