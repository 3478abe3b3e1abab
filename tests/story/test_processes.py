"""One process a service on a real Kafka: scaled up and down while it runs, killed, and nothing is lost."""

import json
import os
import signal
import urllib.error
import urllib.request
from collections import Counter
from functools import partial
from pathlib import Path

import anyio
import pytest
from prometheus_client.parser import text_string_to_metric_families

from kat_stream.log import open_log
from kat_stream.observe.sources import archived_ledger, archived_records
from kat_stream.runs import targets_file
from tests.story.conftest import DEMO, end, kat, settings, start, wait_for
from topics import TrainStep, Trajectory

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(600)]


def live(run_dir: Path) -> dict[str, dict]:
    files = (run_dir / "services").glob("*.json")
    return {path.stem: json.loads(path.read_text()) for path in files}


def owned(bootstrap: str, group: str, member: str) -> int:
    """How many partitions a member of a group has."""

    async def ask() -> int:
        log = open_log(f"kafka:{bootstrap}")
        await log.start()
        try:
            found = {entry.name: entry.members for entry in await log.groups()}
        finally:
            await log.close()
        return sum(len(owns) for name, owns in found.get(group, {}).items() if name.startswith(member))

    return anyio.run(ask)


def test_scale_kill_and_finish(kafka_bootstrap: str, tmp_path: Path) -> None:
    url = f"'kafka:{kafka_bootstrap}'"
    changes = {"log__url": url, "run__name": "apart", "run__steps": "3", "sampler__groups_per_step": "6"}
    run_dir, out = tmp_path / "apart", tmp_path / "out.txt"
    process = start("run", DEMO, *settings(tmp_path, **changes), out=out)
    third = None
    try:
        wait_for("every service", lambda: len(live(run_dir)) >= 11, 180)
        _every_service_answers_metrics(run_dir)
        third = start("serve", "rollout", "--run", run_dir, "--member", "rollout-3", out=tmp_path / "third.txt")
        wait_for("the third worker", lambda: "rollout-3" in live(run_dir), 90)
        wait_for("partitions for it", lambda: owned(kafka_bootstrap, "apart.rollout", "rollout-3"), 90)
        wait_for("work", lambda: "step 1/3" in out.read_text(), 200)
        os.kill(live(run_dir)["rollout-1"]["pid"], signal.SIGKILL)
        third.send_signal(signal.SIGTERM)
        assert third.wait(30) == 0
        shown = kat("tail", "trajectories", "--run", run_dir, "-n", "3")
        assert shown.returncode == 0
        assert len(shown.stdout.strip().splitlines()) == 3
        assert process.wait(400) == 0, out.read_text()
    finally:
        end(process)
        if third is not None:
            end(third)
    assert "rollout-1 died (signal SIGKILL)" in (run_dir / "logs" / "run.log").read_text()
    _nothing_lost_nothing_twice(run_dir)


def _every_service_answers_metrics(run_dir: Path) -> None:
    services = live(run_dir)
    assert set(services) >= {
        "trainer",
        "engine",
        "gateway",
        "packer",
        "verifier-1",
        "rollout-1",
        "rollout-2",
        "sampler",
    }
    targets = {address for entry in json.loads(targets_file(run_dir).read_text()) for address in entry["targets"]}
    assert len(targets) == len(services) + 1
    found: set[str] = set()
    for address in targets:
        wait_for(f"metrics at {address}", partial(_scrape, address, found), 90)
    assert {"kat_policy_version", "kat_rollouts", "kat_train_steps", "sglang:generation_tokens"} <= found


def _scrape(address: str, found: set[str]) -> bool:
    """Add the names that an address exports; False while nobody listens there, as an engine that still loads."""
    try:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
            found |= {family.name for family in text_string_to_metric_families(answer.read().decode())}
    except urllib.error.URLError:
        return False
    return True


def _nothing_lost_nothing_twice(run_dir: Path) -> None:
    records = [record for record, _ in archived_records(run_dir)]
    summary = archived_ledger(run_dir).summary()
    assert summary.requested == 3 * 6 * 4 + 2 * 8 == summary.accounted
    assert sum(summary.in_flight.values()) == 0
    trained = Counter(r for record in records if isinstance(record, TrainStep) for r in record.trained)
    assert set(trained.values()) <= {1}
    workers = Counter(t.rollout_id for t in records if isinstance(t, Trajectory))
    assert len(workers) == summary.requested


def test_services_do_not_outlive_their_supervisor(kafka_bootstrap: str, tmp_path: Path) -> None:
    changes = {"log__url": f"'kafka:{kafka_bootstrap}'", "run__name": "orphans", "run__steps": "50"}
    run_dir = tmp_path / "orphans"
    process = start("run", DEMO, *settings(tmp_path, **changes), out=tmp_path / "out.txt")
    try:
        wait_for("every service", lambda: len(live(run_dir)) >= 11, 180)
        pids = [service["pid"] for service in live(run_dir).values()]
    finally:
        end(process)
    wait_for("the last service to stop", lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 60)
    assert set(live(run_dir)) <= {"run"}
