"""A fabricated run for the tests of this folder."""

from __future__ import annotations

import pytest

from tests.observe_kit import FabricatedRun, small


@pytest.fixture
def small_run() -> FabricatedRun:
    return small()
