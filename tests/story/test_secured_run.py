"""A whole run over TLS with a password: it works, its lag is scraped, and the password is nowhere to be found.

While it goes on it is read by a user who may only read: `kat-viewer`, with READ and DESCRIBE and nothing else. The
broker's access list is the proof that lag, ledger and a shadow trainer touch nothing of a run.
"""

from __future__ import annotations

import json
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kat_stream.access import SERVICES, rules_of
from kat_stream.cli.run import INTERRUPTED
from tests.conftest_secured import USERS, Secured, secured
from tests.story.conftest import DEMO, ENDLESS, end, kat, settings, start, wait_for_word
from tests.waiting import wait_for

__all__ = ["secured"]
pytestmark = [pytest.mark.kafka, pytest.mark.timeout(1200)]
USER, READER = "kat-run", "kat-viewer"
STAGES = {"rollout", "verifier", "packer", "trainer", "archiver"}


@contextmanager
def as_user(monkeypatch: pytest.MonkeyPatch, user: str) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setenv("KAT_KAFKA_USERNAME", user)
        patch.setenv("KAT_KAFKA_PASSWORD", USERS[user])
        yield


def test_a_run_over_tls_with_a_password_that_nobody_can_find(
    secured: Secured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One user for the whole run, with the rights of all its services together, and one who reads it."""
    secured.grant(replace(rule, principal=f"User:{USER}") for name in SERVICES for rule in rules_of(name, "kat."))
    secured.grant(rules_of("viewer", "kat."))
    changes = {"log__url": f"'kafka:{secured.bootstrap}'", "run__name": "safe", "run__steps": str(ENDLESS)}
    words = settings(tmp_path, **changes, **_security(secured))
    run_dir, out = tmp_path / "safe", tmp_path / "out.txt"
    with as_user(monkeypatch, USER):
        process = start("run", DEMO, *words, out=out)
    watcher: subprocess.Popen[bytes] | None = None
    exported: set[tuple[str, str]] = set()
    try:
        wait_for(lambda: len(list((run_dir / "services").glob("*.json"))) >= 11, "every service", 400)
        assert _cmdlines_with(run_dir, USERS[USER]) == []
        wait_for(lambda: _scraped(run_dir, exported), "the lag of every stage", 300)
        wait_for_word(f"step 1/{ENDLESS}", process, out)
        shadow = tmp_path / "shadow.txt"
        with as_user(monkeypatch, READER):
            watcher = start("shadow", run_dir, "--name", "noise", "--seed", "1", out=shadow)
            shown = kat("lag", run_dir, "--json")
            wait_for(lambda: "the account closes" in kat("ledger", run_dir).stdout, "the account to close", 300)
        assert {row["group"] for row in json.loads(shown.stdout)} >= STAGES, shown.stdout + shown.stderr
        wait_for_word("step 1:", watcher, shadow)
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == INTERRUPTED, out.read_text()
    finally:
        end(process)
        if watcher is not None:
            end(watcher)
    secrets = [USERS[user].encode() for user in (USER, READER)]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert [path for path in files for secret in secrets if secret in path.read_bytes()] == []
    assert not any(secret.decode() in shown.stdout + shown.stderr for secret in secrets)


def _security(secured: Secured) -> dict[str, str]:
    values = {"protocol": "SASL_SSL", "ca_file": str(secured.ca_file)}
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
