"""Alert rules and dashboard ask for metrics that exist, and Prometheus accepts the rules and fires them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from kat_stream import telemetry

OPS = Path(__file__).parents[2] / "ops"


def known() -> set[str]:
    assert telemetry.LAG is not None
    names = set()
    for family in REGISTRY.collect():
        names |= {family.name, f"{family.name}_total"} | {f"{family.name}_{end}" for end in ("bucket", "sum", "count")}
    return names


@pytest.mark.parametrize("path", ["prometheus/alerts.yml", "grafana/kat-stream.json"])
def test_only_metrics_that_exist_are_asked_for(path: str) -> None:
    text = (OPS / path).read_text()
    kinds = "lag|unacknowledged|rollouts?|train|groups|gradings|weight|policy|staleness"
    asked = set(re.findall(rf"\b(kat_(?:{kinds})\w*)", text))
    assert asked - known() == set()
    assert {"kat_lag_messages", "kat_lag_seconds"} <= asked


def test_a_panel_shows_lag() -> None:
    panels = json.loads((OPS / "grafana" / "kat-stream.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(places)) == len(places)
    assert [panel["targets"][0]["expr"] for panel in panels if "lag" in panel["title"].lower()] == [
        "max by (stage, topic) (kat_lag_seconds)",
        "max by (stage, topic) (kat_lag_messages)",
    ]


RULE_TEST = """\
rule_files: [{rules}]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - {{series: 'kat_lag_seconds{{run="r", stage="packer", topic="rewards"}}', values: '0+60x30'}}
      - {{series: 'kat_lag_messages{{run="r", stage="packer", topic="rewards"}}', values: '5x30'}}
      - {{series: 'kat_lag_seconds{{run="r", stage="verifier", topic="trajectories"}}', values: '2x30'}}
      - {{series: 'kat_lag_messages{{run="r", stage="verifier", topic="trajectories"}}', values: '1x30'}}
    alert_rule_test:
      - eval_time: 5m
        alertname: StageBehind
        exp_alerts: []
      - eval_time: 20m
        alertname: StageBehind
        exp_alerts:
          - exp_labels: {{severity: warning, run: r, stage: packer, topic: rewards}}
            exp_annotations:
              summary: "packer of r is 20m 0s behind in rewards"
              runbook: "ops/runbooks/kafka.md: a stage is behind"
      - eval_time: 20m
        alertname: StageStandsStill
        exp_alerts:
          - exp_labels: {{severity: critical, run: r, stage: packer, topic: rewards}}
            exp_annotations:
              summary: "packer of r has finished nothing of rewards for 15 minutes"
              runbook: "ops/runbooks/kafka.md: a stage is behind"
"""


@pytest.mark.skipif(shutil.which("promtool") is None, reason="environment: needs Prometheus' promtool")
def test_prometheus_accepts_the_rules_and_fires_them(tmp_path: Path) -> None:
    rules = OPS / "prometheus" / "alerts.yml"
    (tmp_path / "test.yml").write_text(RULE_TEST.format(rules=rules))
    for words in (["check", "config", OPS / "prometheus" / "prometheus.yml"], ["test", "rules", tmp_path / "test.yml"]):
        done = subprocess.run(["promtool", *map(str, words)], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
