"""The start of a run on a log that is away or slow: it is waited for, loudly and not for ever."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from kat_stream import execute
from kat_stream.config import load
from kat_stream.errors import LogUnavailable
from kat_stream.log import MemoryLog
from kat_stream.observe.progress import Progress
from kat_stream.runs import create_run
from topics import CATALOGUE

pytestmark = pytest.mark.anyio
NOBODY = "kafka:127.0.0.1:1"


async def test_a_log_that_answers_late_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(execute, "RETRY_S", 0.001)
    log, attempts = MemoryLog(), 0

    async def apply_topics() -> None:
        nonlocal attempts
        attempts += 1
        if attempts < 3:
            raise LogUnavailable("offsets of tasks: TimeoutError")
        await log.apply_topics(CATALOGUE)

    await execute.when_there(apply_topics, tmp_path)
    assert len(await log.topics()) == len(CATALOGUE)
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(said) == 2 and all("offsets of tasks" in line for line in said)  # errors reach the terminal


async def test_one_that_stays_away_ends_the_run_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execute, "START_S", 0.0)
    config, run_dir = create_run(load(None, [f"run.directory='{tmp_path}'", "run.name='r'", f"log.url='{NOBODY}'"]))
    with pytest.raises(LogUnavailable, match="no Kafka answers at") as given_up:
        await execute.execute(config, run_dir, resume=False, progress=Progress(steps=1))
    assert f"kat-stream run --resume {run_dir}" in str(given_up.value)
