"""The supervisor with real processes: what dies is started again and named, what hangs is killed, what cannot live or
finds no broker ends the run with the reason."""

import logging
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from kat_stream.config import load
from kat_stream.errors import ServiceDied
from kat_stream.log import open_log
from kat_stream.ports import choose_port
from kat_stream.runs import create_run
from kat_stream.supervisor import Patience, supervise
from kat_stream.telemetry import DEATHS
from tests.chaos.system import member_pid
from tests.story.conftest import kat
from tests.waiting import until
from topics import CATALOGUE, PolicyVersion

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(600)]


@pytest.fixture
def run_dir(kafka_bootstrap: str, tmp_path: Path) -> Iterator[Path]:
    """A run on the broker with its topics; no service of it has been started."""
    _, folder = create_run(
        load(None, [f"log.url=kafka:{kafka_bootstrap}", f"run.directory={tmp_path}", "run.name=supervised"])
    )

    async def apply() -> None:
        log = open_log(f"kafka:{kafka_bootstrap}")
        await log.start()
        try:
            await log.apply_topics(CATALOGUE)
        finally:
            await log.close()

    anyio.run(apply)
    yield folder
    assert not _processes_of(folder)


def _processes_of(run_dir: Path) -> list[str]:
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, timeout=10).stdout.splitlines()
    return [line for line in listed if "kat_stream.cli serve" in line and str(run_dir) in line]


async def _new_pid(run_dir: Path, member: str, old: int, deadline_s: float = 150) -> int:
    await until(lambda: member_pid(run_dir, member) not in (0, old), f"{member}'s next process", deadline_s)
    return member_pid(run_dir, member)


def _deaths(member: str, how: str) -> float:
    return DEATHS.labels(member, how)._value.get()


def test_a_dead_service_is_started_again_and_named(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = _deaths("verifier-1", "signal SIGKILL")

    async def scenario() -> None:
        stopping = anyio.Event()
        async with anyio.create_task_group() as group:
            group.start_soon(supervise, run_dir, stopping, ("verifier-1",))
            first = await _new_pid(run_dir, "verifier-1", 0)
            os.kill(first, signal.SIGKILL)
            second = await _new_pid(run_dir, "verifier-1", first)
            assert second != first
            stopping.set()

    with caplog.at_level(logging.ERROR):
        anyio.run(scenario)
    assert "verifier-1 died (signal SIGKILL)" in caplog.text
    assert _deaths("verifier-1", "signal SIGKILL") == before + 1


def test_a_service_that_is_frozen_is_killed_and_started_again(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = _deaths("verifier-1", "hang")
    patience = Patience(first_beat_s=60.0, hang_s=6.0, failures=1)  # not its fault: the first one would end the run

    async def scenario() -> None:
        stopping = anyio.Event()
        async with anyio.create_task_group() as group:
            group.start_soon(supervise, run_dir, stopping, ("verifier-1",), patience)
            first = await _new_pid(run_dir, "verifier-1", 0)
            os.kill(first, signal.SIGSTOP)
            began = time.monotonic()
            await _new_pid(run_dir, "verifier-1", first)
            assert time.monotonic() - began >= 4.0
            stopping.set()

    with caplog.at_level(logging.ERROR):
        anyio.run(scenario)
    assert "verifier-1 hangs: somebody has stopped it" in caplog.text
    assert _deaths("verifier-1", "hang") > before


def test_a_short_freeze_is_no_hang(run_dir: Path) -> None:
    async def scenario() -> None:
        stopping = anyio.Event()
        async with anyio.create_task_group() as group:
            group.start_soon(supervise, run_dir, stopping, ("verifier-1",), Patience(hang_s=8.0))
            first = await _new_pid(run_dir, "verifier-1", 0)
            os.kill(first, signal.SIGSTOP)
            with anyio.move_on_after(4):
                await _new_pid(run_dir, "verifier-1", first)
            os.kill(first, signal.SIGCONT)
            with anyio.move_on_after(6):
                await _new_pid(run_dir, "verifier-1", first)
            assert member_pid(run_dir, "verifier-1") == first
            stopping.set()

    anyio.run(scenario)


def test_a_service_that_dies_again_and_again_ends_the_run_with_its_last_words(run_dir: Path) -> None:
    config = run_dir / "config.toml"
    config.write_text(config.read_text().replace("mend:train?count=4000&seed=0", "mend:nowhere"))
    patience = Patience(deaths=3, within_s=600.0, backoff_s=(0.1,))

    async def scenario() -> None:
        await supervise(run_dir, anyio.Event(), ("sampler", "verifier-1"), patience)

    with pytest.raises(ServiceDied) as died:
        anyio.run(scenario)
    assert str(died.value).startswith("sampler died 3 times within 600 s, last exit code")
    assert "nowhere" in str(died.value)


def test_only_a_sampler_whose_schedule_is_done_ends_the_run(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = run_dir / "config.toml"
    config.write_text(config.read_text().replace("eval_after = true", "eval_after = false"))
    loaded = load(config)

    async def finish_training() -> None:
        log = open_log(loaded.log.url)
        await log.start()
        last = PolicyVersion(
            run=loaded.run.name, model="m", lineage="a", number=loaded.run.steps, path="", checksum=""
        )  # fmt: skip
        try:
            await log.publish(last)
        finally:
            await log.close()

    async def scenario() -> None:
        stopping = anyio.Event()
        async with anyio.create_task_group() as group:
            group.start_soon(supervise, run_dir, stopping, ("sampler",))
            first = await _new_pid(run_dir, "sampler", 0)
            said = run_dir / "logs" / "sampler.log"
            await until(lambda: "training tasks" in said.read_text(), "a sampler that a signal does not kill")
            os.kill(first, signal.SIGTERM)
            await _new_pid(run_dir, "sampler", first)
            assert not stopping.is_set() and "the schedule is done" not in caplog.text
            await finish_training()
            with anyio.fail_after(60):
                await stopping.wait()

    with caplog.at_level(logging.INFO):
        anyio.run(scenario)
    assert "sampler died (exit code 0)" in caplog.text
    assert "the schedule is done" in caplog.text
    assert kat("serve", "sampler", "--run", run_dir).returncode == 0, "for a shell, what is done is done"


def test_services_without_a_broker_are_tried_for_longer_and_then_named(run_dir: Path) -> None:
    nowhere = f"kafka:127.0.0.1:{choose_port()}"
    config = run_dir / "config.toml"
    url = load(config).log.url
    config.write_text(config.read_text().replace(url, nowhere))
    assert kat("serve", "verifier", "--run", run_dir).returncode == 75
    patience = Patience(deaths=2, backoff_s=(0.1,), away_s=6.0)
    began = time.monotonic()

    async def scenario() -> None:
        await supervise(run_dir, anyio.Event(), ("verifier-1",), patience)

    with pytest.raises(ServiceDied, match="verifier-1: what it needs was away for"):
        anyio.run(scenario)
    assert time.monotonic() - began > 6.0
