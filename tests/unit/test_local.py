"""A whole run in one process: the error of a service is the run's error, by its own name."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from kat_stream import local
from kat_stream.config import load
from kat_stream.errors import DeadlineExceeded
from kat_stream.execute import execute
from kat_stream.log.memory import MemoryLog
from kat_stream.observe.progress import Progress
from kat_stream.runs import create_run
from kat_stream.service import Context

pytestmark = pytest.mark.anyio


class Failing:
    """A service of which one task raises."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    async def run(self, ctx: Context) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(self._fail)
            await ctx.stopping.wait()

    async def _fail(self) -> None:
        raise self.error


async def test_a_service_that_fails_in_its_own_task_group_ends_the_run_with_the_error_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    error = DeadlineExceeded("the first policy version from the trainer", 180)
    monkeypatch.setattr(local, "load_service", lambda _name: Failing(error))
    config, run_dir = create_run(load(None, [f"run.directory='{tmp_path}'", "run.name=r"]))
    result = await execute(config, run_dir, resume=False, progress=Progress(steps=1))
    assert result.error is error
    assert "stopped: DeadlineExceeded: the first policy version from the trainer: nothing within 180 s" in caplog.text


async def test_what_nobody_raised_on_purpose_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "load_service", lambda _name: Failing(ZeroDivisionError()))
    ctx = Context(load(None), "r", tmp_path, MemoryLog(), "run")
    with pytest.raises(ExceptionGroup) as caught:
        await local.run_local(ctx, ["packer"])
    assert caught.group_contains(ZeroDivisionError)
