"""One process a service on a real Kafka: scaled up and down while it runs, killed, and nothing is lost."""

from collections import Counter
from pathlib import Path

import pytest

from kat_stream.observe.lineages import surviving
from kat_stream.observe.sources import archived_ledger, archived_records
from tests.story.conftest import DEMO, ENDLESS, STEPS, end, live, settings, start
from tests.waiting import wait_for
from topics import TrainStep, Trajectory

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(1500)]


def test_scale_kill_and_finish(struck: Path) -> None:
    log = (struck / "logs" / "run.log").read_text()
    assert "rollout-1 died (signal SIGKILL)" in log
    assert "trainer died (signal SIGKILL)" in log
    records = [record for record, _ in archived_records(struck)]
    summary = archived_ledger(struck).summary()
    assert summary.requested == STEPS * 3 * 4 + 2 * 8 == summary.accounted
    assert sum(summary.in_flight.values()) == 0
    steps = surviving([record for record in records if isinstance(record, TrainStep)])
    trained = Counter(rollout for step in steps for rollout in step.trained)
    assert set(trained.values()) == {1}
    workers = Counter(t.rollout_id for t in records if isinstance(t, Trajectory))
    assert len(workers) == summary.requested


def test_services_do_not_outlive_their_supervisor(kafka_bootstrap: str, tmp_path: Path) -> None:
    changes = {"log__url": f"'kafka:{kafka_bootstrap}'", "run__name": "orphans", "run__steps": str(ENDLESS)}
    run_dir = tmp_path / "orphans"
    process = start("run", DEMO, *settings(tmp_path, **changes), out=tmp_path / "out.txt")
    try:
        wait_for(lambda: len(live(run_dir)) >= 11, "every service", 400)
        pids = [service["pid"] for service in live(run_dir).values()]
    finally:
        end(process)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "the last service to stop", 120)
    assert set(live(run_dir)) <= {"run"}
