"""A rollout that fails on our side is tried so often and no more, whichever workers try it."""

from __future__ import annotations

from typing import Any

import pytest

from consumers.rollout import RolloutHandler
from kat_stream.log import Delivered, Emit, Position, Retry
from kat_stream.log.message import seal
from kat_stream.log.retries import numbered
from tests.observe_kit import RUN, request, trajectory
from topics import RolloutRequest, Trajectory

pytestmark = pytest.mark.anyio


class Failing:
    """A runner without sandboxes."""

    async def run_graded(self, asked: RolloutRequest, attempt: int = 1) -> tuple[Trajectory, None]:
        return trajectory(asked, "infra_error", "SandboxUnavailable", attempt), None


async def test_attempts_go_with_the_message_from_worker_to_worker() -> None:
    message = seal(request("g", 0, 1))
    delivered = Delivered(Position(message.topic, 0, 0), message.key, message.value, message.headers, 0)
    runner: Any = Failing()
    for attempt in (1, 2):
        assert isinstance(await RolloutHandler(RUN, runner, attempts=3)(numbered(delivered, attempt)), Retry)
    ended = await RolloutHandler(RUN, runner, attempts=3)(numbered(delivered, 3))
    assert isinstance(ended, Emit) and isinstance(said := ended.records[0], Trajectory) and said.attempt == 3
