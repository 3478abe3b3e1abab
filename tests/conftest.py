"""Which tests go together where several processes run the suite (`make test`): those of a file, or of a fixture.

Not by marks: xdist 3.8 with pytest 9.2 passes over `xdist_group`, and deals a file's tests to all processes.
"""

from __future__ import annotations

import os
from pathlib import PurePath
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadFileScheduling

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
"""Before torch is loaded: its threads that wait for each other leave the cores to the suite's other processes."""

# A timing is no assertion: the machine may be busy.
settings.register_profile("suite", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


SHARED = {
    "struck": ("test_processes.py", "test_time_travel.py"),
    "kafka_cluster_dir": ("test_broker.py", "test_kafka_frozen.py", "test_kafka_outage.py", "test_topics_kafka.py"),
}
"""Session fixtures that cost so much that only one process may make them, and the files that ask for them."""


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


class Together(LoadFileScheduling):
    """A file is run by one process, and so are the files that share a fixture."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return next((fixture for fixture, files in SHARED.items() if PurePath(file).name in files), file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Together:
    return Together(config, log)
