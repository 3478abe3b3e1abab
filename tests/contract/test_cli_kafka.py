"""The command line against a real broker: topics, tail, ledger and dead letters of a run that lives on Kafka."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import anyio
import msgspec
import pytest

from kat_stream.cli import main
from kat_stream.config import Config, dump
from kat_stream.log import Committed, Delivered, open_log
from tests.contract.log_records import nothing
from tests.observe_kit import FabricatedRun, entry, request, small

pytestmark = pytest.mark.kafka


async def publish(url: str, run: FabricatedRun) -> None:
    log = open_log(url)
    await log.start()
    await log.publish(*(record for record, _ in run.records))
    await log.close()


@pytest.fixture(scope="module")
def url(kafka_bootstrap: str) -> str:
    """A broker that holds the small run under the default prefix."""
    address = f"kafka:{kafka_bootstrap}"
    assert main(["topics", "apply", "--log", address]) == 0
    anyio.run(publish, address, small())
    return address


@pytest.fixture
def run_dir(url: str, tmp_path: Path) -> Path:
    config = Config()
    named = msgspec.structs.replace(config.run, name="demo")
    on_kafka = msgspec.structs.replace(config, run=named, log=msgspec.structs.replace(config.log, url=url))
    (tmp_path / "config.toml").write_text(dump(on_kafka))
    return tmp_path


def test_topics_that_were_applied_do_not_differ(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["topics", "diff", "--log", url]) == 0
    assert capsys.readouterr().out == "no difference\n"
    assert main(["topics", "apply", "--log", url]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_the_ledger_of_a_live_run(run_dir: Path, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ledger", str(run_dir)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"run demo, from {url}\n")
    assert "the account closes: 20 = 20" in said


def test_trace_and_dead_letters_of_a_live_run(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "demo-t000001-1", "--run", str(run_dir)]) == 0
    assert capsys.readouterr().out.endswith("fate: trained in step 1\n")
    assert main(["dead-letters", "list", "--run", str(run_dir)]) == 0
    assert capsys.readouterr().out == "no dead letters\n"


def test_lag_of_a_group_that_read_one_message(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    async def read_one() -> None:
        log = open_log(url)
        await log.start()
        member = await log.join(["train.steps"], group="slow", member="one", on_revoked=nothing)
        read: list[Delivered] = []
        with anyio.fail_after(60):
            while not read:
                read = await member.poll(limit=1, timeout_s=0.5)
        await member.commit({read[0].position.topic_partition: Committed(read[0].position.offset + 1)})
        await member.leave()
        await log.close()

    anyio.run(read_one)
    assert main(["lag", "--log", url, "--json"]) == 0
    (slow,) = [one for one in json.loads(capsys.readouterr().out) if one["group"] == "slow"]
    assert (slow["topic"], slow["messages"]) == ("train.steps", 1)
    assert slow["seconds"] > 0
    assert main(["lag", "--log", url]) == 0
    assert capsys.readouterr().out.startswith("STAGE")


def test_tail_stops_after_n(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tail", "rewards", "--from", "earliest", "-n", "3", "--log", url]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_tail_from_another_terminal_sees_what_comes(run_dir: Path, url: str) -> None:
    """From `latest`: records from before are not shown, the first one after is."""
    command = [sys.executable, "-m", "kat_stream.cli", "tail", "ledger", "-n", "1", "--run", str(run_dir)]
    late = FabricatedRun()
    late.add(entry(request("demo-t000077", 0, 1), "cancelled", "late"))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as tail:
        try:
            deadline = time.monotonic() + 60
            # The tail does not say when it stands at the end: publish until it has seen one.
            while tail.poll() is None and time.monotonic() < deadline:
                anyio.run(publish, url, late)
            out, err = tail.communicate(timeout=10)
        finally:
            tail.kill()
    assert tail.returncode == 0, err
    assert out.endswith("demo-t000077-0  cancelled (late), says rollout\n")


def test_a_service_refuses_topics_of_another_partition_count(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its records would lie elsewhere than those of the services that began before somebody added partitions."""
    config = run_dir / "config.toml"
    config.write_text(config.read_text().replace("partitions = 12", "partitions = 11"))
    assert main(["serve", "sampler", "--run", str(run_dir)]) == 1
    assert "rewards has 12 partitions, the catalogue says 11" in capsys.readouterr().err
