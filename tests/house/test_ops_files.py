"""Alert rules and dashboard ask for metrics and labels that exist, and Prometheus accepts the rules and fires them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from prometheus_client.metrics import MetricWrapperBase

import consumers.scorer
import kat_stream.gateway.metrics
import kat_stream.routing.router
import kat_stream.telemetry
from kat_stream.engines.embedded import metrics as engine_metrics

ROOT = Path(__file__).parents[2]
OPS = ROOT / "ops"
HOMES = (kat_stream.telemetry, kat_stream.gateway.metrics, kat_stream.routing.router, consumers.scorer)
OF_TARGETS = {"run", "service", "job", "instance", "le"}
"""Labels that every series gets from its scrape, and that of buckets."""
SELECTOR = re.compile(r"((?:kat_|sglang:)\w+)(?:\{([^}]*)\})?")


def exported() -> dict[str, MetricWrapperBase]:
    """Name on /metrics -> what we register under it."""
    ours = {one for home in HOMES for one in vars(home).values() if isinstance(one, MetricWrapperBase)}
    found = {}
    for one in ours:
        (family,) = one.describe()
        found[family.name + ("_total" if family.type == "counter" else "")] = one
    assert found and all(one in REGISTRY._collector_to_names for one in ours)
    return found


def labels_of(name: str) -> set[str]:
    """KeyError for a metric that nobody exports."""
    if name.startswith("sglang:"):
        assert name.removeprefix("sglang:").removesuffix("_total") in Path(engine_metrics.__file__).read_text()
        return {"model_name"}
    found = exported()
    return set(found[name if name in found else re.sub(r"_(bucket|sum|count)$", "", name)]._labelnames)


def dashboard_exprs() -> list[str]:
    panels = json.loads((OPS / "grafana" / "kat-stream.json").read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


def alert_exprs() -> list[str]:
    return re.findall(r"^ +expr: (.+)$", (OPS / "prometheus" / "alerts.yml").read_text(), re.MULTILINE)


@pytest.mark.parametrize("expr", [*dashboard_exprs(), *alert_exprs()])
def test_only_metrics_and_labels_that_exist_are_asked_for(expr: str) -> None:
    selectors = SELECTOR.findall(expr)
    assert selectors
    known = OF_TARGETS.union(*(labels_of(name) for name, _ in selectors))
    asked = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", " ".join(matchers for _, matchers in selectors)))
    for by in re.findall(r"\bby \(([^)]*)\)", expr):
        asked |= set(re.findall(r"\w+", by))
    assert asked - known == set()


def test_every_panel_tells_runs_apart() -> None:
    panels = json.loads((OPS / "grafana" / "kat-stream.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(places)) == len(places)
    for expr in dashboard_exprs():
        assert all('run=~"$run"' in matchers for _, matchers in SELECTOR.findall(expr)), expr
        assert re.findall(r"\bby \((\w+)", expr) == ["run"] * len(re.findall(r"\b(?:sum|max)\b", expr)), expr
    assert {"kat_lag_seconds", "kat_lag_messages"} <= {
        name for expr in dashboard_exprs() for name, _ in SELECTOR.findall(expr)
    }


def test_every_metric_is_described() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| (\w+) \| (.*?) \| (.*) \|$", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE
    )
    want = {
        (name, one._type, ", ".join(one._labelnames) or "-", one._documentation) for name, one in exported().items()
    }
    assert set(rows) == want
    assert len(rows) == len(want)


RULE_TEST = """\
rule_files: [{rules}]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - {{series: 'kat_lag_seconds{{run="r", stage="verifier", topic="trajectories"}}', values: '0+60x30'}}
      - {{series: 'kat_lag_messages{{run="r", stage="verifier", topic="trajectories"}}', values: '5x30'}}
      - {{series: 'kat_lag_seconds{{run="r", stage="scorer", topic="trajectories"}}', values: '2x30'}}
      - {{series: 'kat_lag_messages{{run="r", stage="scorer", topic="trajectories"}}', values: '1x30'}}
      - {{series: 'kat_lag_seconds{{run="r", stage="packer", topic="rewards"}}', values: '0+60x80'}}
      - {{series: 'kat_lag_messages{{run="r", stage="packer", topic="rewards"}}', values: '5x80'}}
    alert_rule_test:
      - eval_time: 5m
        alertname: StageBehind
        exp_alerts: []
      - eval_time: 20m
        alertname: StageBehind
        exp_alerts:
          - exp_labels: {{severity: warning, run: r, stage: verifier, topic: trajectories}}
            exp_annotations:
              summary: "verifier of r is 20m 0s behind in trajectories"
              runbook: "ops/runbooks/kafka.md: a stage is behind"
      - eval_time: 20m
        alertname: StageStandsStill
        exp_alerts:
          - exp_labels: {{severity: critical, run: r, stage: verifier, topic: trajectories}}
            exp_annotations:
              summary: "verifier of r has finished nothing of trajectories for 15 minutes"
              runbook: "ops/runbooks/kafka.md: a stage is behind"
      - eval_time: 50m
        alertname: LongWorkBehind
        exp_alerts: []
      - eval_time: 70m
        alertname: LongWorkBehind
        exp_alerts:
          - exp_labels: {{severity: warning, run: r, stage: packer, topic: rewards}}
            exp_annotations:
              summary: "packer of r has work that waits for 1h 10m 0s"
              runbook: "ops/runbooks/kafka.md: a stage is behind"
  - interval: 1m
    input_series:
      - {{series: 'kat_lag_read_timestamp_seconds{{run="r", service="run"}}', values: '0 60 120 180 240 240x20'}}
      - {{series: 'kat_lag_read_timestamp_seconds{{run="new", service="lag"}}', values: '0x20'}}
      - {{series: 'kat_lag_read_timestamp_seconds{{run="r", service="packer"}}', values: '0x20'}}
      - {{series: 'kat_lag_messages{{run="r", service="run", stage="packer", topic="rewards"}}', values: '5x20'}}
      - {{series: 'kat_unacknowledged_seconds{{run="r", service="packer"}}', values: '0 0 20 20 20 0x20'}}
      - series: 'kat_dead_letters_total{{run="r", stage="verifier", topic="turns", error="DecodeError"}}'
        values: '_x5 1x12 3x30'
    alert_rule_test:
      - eval_time: 4m
        alertname: LagUnknown
        exp_alerts:
          - &never
            exp_labels: {{severity: warning, run: new, service: lag}}
            exp_annotations:
              summary: "the lag of new is not known: its log does not answer"
              runbook: "ops/runbooks/kafka.md: broker down"
      - eval_time: 9m
        alertname: LagUnknown
        exp_alerts:
          - *never
          - exp_labels: {{severity: warning, run: r, service: run}}
            exp_annotations:
              summary: "the lag of r is not known: its log does not answer"
              runbook: "ops/runbooks/kafka.md: broker down"
      - eval_time: 4m
        alertname: DeadLetters
        exp_alerts: []
      - eval_time: 6m
        alertname: DeadLetters
        exp_alerts: &letters
          - exp_labels: {{severity: warning, run: r, stage: verifier, topic: turns, error: DecodeError}}
            exp_annotations:
              summary: "verifier of r cannot use messages of turns: DecodeError"
              runbook: "ops/runbooks/dead-letters.md"
      - eval_time: 22m
        alertname: DeadLetters
        exp_alerts: *letters
      - eval_time: 40m
        alertname: DeadLetters
        exp_alerts: []
      - eval_time: 4m
        alertname: LogDoesNotAcknowledge
        exp_alerts:
          - exp_labels: {{severity: critical, run: r, service: packer}}
            exp_annotations:
              summary: "packer of r waits for a broker to acknowledge what it sends"
              runbook: "ops/runbooks/kafka.md: broker down"
  - interval: 1m
    input_series:
      - {{series: 'kat_policy_version{{run="r", service="trainer"}}', values: '0 1x60 2x80'}}
      - {{series: 'kat_policy_version{{run="r", service="packer"}}', values: '0x140'}}
      - {{series: 'kat_service_deaths_total{{run="r", member="packer", how="hang"}}', values: '1x9 4x20'}}
      - {{series: 'kat_service_deaths_total{{run="r", member="engine", how="hang"}}', values: '1x9 2x20'}}
    alert_rule_test:
      - eval_time: 11m
        alertname: ServiceDies
        exp_alerts:
          - exp_labels: {{severity: warning, run: r, member: packer}}
            exp_annotations:
              summary: "packer of r dies again and again"
              runbook: "ops/runbooks/README.md: a service dies again and again"
      - eval_time: 25m
        alertname: ServiceDies
        exp_alerts: []
      - eval_time: 30m
        alertname: RunStandsStill
        exp_alerts: []
      - eval_time: 65m
        alertname: RunStandsStill
        exp_alerts: []
      - eval_time: 125m
        alertname: RunStandsStill
        exp_alerts:
          - exp_labels: {{severity: critical, run: r}}
            exp_annotations:
              summary: "r has made no optimizer step for an hour"
              runbook: "ops/runbooks/README.md: is it healthy?"
"""


@pytest.mark.skipif(shutil.which("promtool") is None, reason="environment: needs Prometheus' promtool")
def test_prometheus_accepts_the_rules_and_fires_them(tmp_path: Path) -> None:
    rules = OPS / "prometheus" / "alerts.yml"
    (tmp_path / "test.yml").write_text(RULE_TEST.format(rules=rules))
    records = [{"record": f"panel:{number}", "expr": expr} for number, expr in enumerate(dashboard_exprs())]
    (tmp_path / "panels.yml").write_text(json.dumps({"groups": [{"name": "dashboard", "rules": records}]}))
    for words in (
        ["check", "config", OPS / "prometheus" / "prometheus.yml"],
        ["check", "rules", tmp_path / "panels.yml"],
        ["test", "rules", tmp_path / "test.yml"],
    ):
        done = subprocess.run(["promtool", *map(str, words)], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
