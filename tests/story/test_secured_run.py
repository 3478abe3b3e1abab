"""A whole run over TLS with a password: it works, its lag is scraped, and the password is nowhere to be found."""

from __future__ import annotations

import json
import signal
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kat_stream.access import SERVICES, rules_of
from kat_stream.cli.run import INTERRUPTED
from tests.conftest_secured import USERS, Secured, secured
from tests.story.conftest import DEMO, ENDLESS, end, kat, settings, start, wait_for

__all__ = ["secured"]
pytestmark = [pytest.mark.kafka, pytest.mark.timeout(1200)]
USER = "kat-run"
STAGES = {"rollout", "verifier", "packer", "trainer", "archiver"}


def test_a_run_over_tls_with_a_password_that_nobody_can_find(
    secured: Secured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One user for the whole run, with the rights of all its services together."""
    secured.grant(replace(rule, principal=f"User:{USER}") for name in SERVICES for rule in rules_of(name, "kat."))
    monkeypatch.setenv("KAT_KAFKA_PASSWORD", USERS[USER])
    changes = {"log__url": f"'kafka:{secured.bootstrap}'", "run__name": "safe", "run__steps": str(ENDLESS)}
    words = settings(tmp_path, **changes, **_security(secured))
    run_dir, out = tmp_path / "safe", tmp_path / "out.txt"
    process = start("run", DEMO, *words, out=out)
    exported: set[tuple[str, str]] = set()
    try:
        wait_for("every service", lambda: len(list((run_dir / "services").glob("*.json"))) >= 11, 400)
        assert _cmdlines_with(run_dir, USERS[USER]) == []
        wait_for("the lag of every stage", lambda: _scraped(run_dir, exported), 300)
        shown = kat("lag", run_dir, "--json")
        assert shown.returncode == 0, shown.stderr
        assert {row["group"] for row in json.loads(shown.stdout)} >= STAGES
        wait_for("a step", lambda: f"step 1/{ENDLESS}" in out.read_text(), 400)
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == INTERRUPTED, out.read_text()
    finally:
        end(process)
    secret = USERS[USER].encode()
    files = [path for path in (*run_dir.rglob("*"), out) if path.is_file()]
    assert len(files) > 20
    assert [path for path in files if secret in path.read_bytes()] == []
    assert secret.decode() not in shown.stdout + shown.stderr


def _security(secured: Secured) -> dict[str, str]:
    values = {"protocol": "SASL_SSL", "username": USER, "ca_file": str(secured.ca_file)}
    return {f"log__security__{key}": f"'{value}'" for key, value in values.items()}


def _cmdlines_with(run_dir: Path, secret: str) -> list[str]:
    """Command lines of the run's processes that hold the secret."""
    pids = [json.loads(path.read_text())["pid"] for path in (run_dir / "services").glob("*.json")]
    assert len(pids) >= 11
    lines = [Path(f"/proc/{pid}/cmdline").read_bytes().decode() for pid in pids]
    assert all("kat_stream.cli" in line for line in lines)
    return [line for line in lines if secret in line]


def _scraped(run_dir: Path, exported: set[tuple[str, str]]) -> bool:
    """Whether the run's /metrics has exported messages and seconds of every stage by now."""
    where = json.loads((run_dir / "services" / "run.json").read_text())["metrics"]
    with urllib.request.urlopen(where, timeout=60) as answer:
        for family in text_string_to_metric_families(answer.read().decode()):
            exported |= {(family.name, sample.labels["stage"]) for sample in family.samples if "stage" in sample.labels}
    wanted = {(name, stage) for name in ("kat_lag_messages", "kat_lag_seconds") for stage in STAGES}
    return wanted <= exported
