"""Ctrl-C stops within seconds and says how to go on; a resumed run goes on where the checkpoint is."""

import os
import signal
from collections import Counter
from pathlib import Path

import pytest

from kat_stream.observe.sources import archived_ledger, archived_records
from tests.story.conftest import DEMO, ENDLESS, end, kat, settings, start, wait_for_word
from topics import PolicyVersion, TrainStep, Trajectory

pytestmark = pytest.mark.timeout(900)
STOP_S = 15.0
"""On a loaded machine; far below what an agent's rollout or the orderly end of a schedule may take."""


def test_stop_and_resume(tmp_path: Path) -> None:
    out = tmp_path / "out.txt"
    process = start("run", DEMO, *settings(tmp_path, run__name="cut", run__steps=str(ENDLESS)), out=out)
    try:
        wait_for_word(f"step 1/{ENDLESS}", process, out)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole foreground group
        assert process.wait(STOP_S) == 130
    finally:
        end(process)
    assert "go on with: kat-stream run --resume" in out.read_text()
    last = max(record.step for record, _ in archived_records(tmp_path / "cut") if isinstance(record, TrainStep)) + 2
    config = tmp_path / "cut" / "config.toml"
    config.write_text(config.read_text().replace(f"steps = {ENDLESS}", f"steps = {last}"))

    done = kat("run", "--resume", tmp_path / "cut", deadline_s=400)
    assert done.returncode == 0, done.stdout + done.stderr
    records = [record for record, _ in archived_records(tmp_path / "cut")]
    assert not [r for r in records if isinstance(r, Trajectory) and r.outcome == "sandbox_died"]
    steps = [record for record in records if isinstance(record, TrainStep)]
    assert [step.step for step in steps] == list(range(1, last + 1))
    assert len({step.lineage for step in steps}) == 2
    trained = Counter(rollout for step in steps for rollout in step.trained)
    assert set(trained.values()) == {1}
    versions = [record for record in records if isinstance(record, PolicyVersion)]
    second = next(version for version in versions if version.parent_lineage)
    assert (second.parent_lineage, second.parent_number) == (steps[0].lineage, second.number)
    ledger = archived_ledger(tmp_path / "cut")
    summary = ledger.summary()
    assert summary.requested == summary.accounted
    assert sum(summary.in_flight.values()) == 0


def test_a_resume_without_a_run_says_where_it_looked(tmp_path: Path) -> None:
    done = kat("run", "--resume", tmp_path / "nothing")
    assert done.returncode == 2
    assert "no run" in done.stderr


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = kat("run", DEMO, *settings(tmp_path, gateway__port=str(port)))
    assert done.returncode == 2
    assert f"gateway.port: 127.0.0.1:{port} cannot be used" in done.stderr
