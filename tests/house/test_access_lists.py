"""The access lists, the header of each service file and the file in ops/ say the same."""

from __future__ import annotations

import ast
import json
import re
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest

from kat_stream.access import ALL, SERVICES, rules_of
from kat_stream.cli import main
from kat_stream.errors import ConfigError
from kat_stream.service import SERVICE_GROUP

ROOT = Path(__file__).parents[2]
REGISTERED = sorted(entry_points(group=SERVICE_GROUP), key=lambda entry: entry.name)


def header_line(module: str, name: str) -> set[str]:
    """The topics that a line of a service's header names."""
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    header = ast.get_docstring(ast.parse(Path(spec.origin).read_text())) or ""
    line = re.search(rf"^{name}: +((?:.*)(?:\n +.*)*)", header, re.MULTILINE)
    assert line is not None, f"{module} has no line {name}"
    text = line[1]
    if "every topic" in text:
        return set(ALL)
    return {topic for topic in ALL if re.search(rf"(?<![\w./]){re.escape(topic)}(?![\w/.]*\w)", text)}


def test_every_service_has_an_access_list() -> None:
    assert {entry.name for entry in REGISTERED} == SERVICES.keys() - {"run", "viewer"}


@pytest.mark.parametrize("entry", REGISTERED, ids=lambda entry: entry.name)
def test_a_header_agrees_with_the_access_list(entry: object) -> None:
    access = SERVICES[entry.name]  # type: ignore[attr-defined]
    module = entry.value.partition(":")[0]  # type: ignore[attr-defined]
    reads, writes = header_line(module, "In"), header_line(module, "Out")
    assert writes - {"dead.letters"} == set(access.writes)
    assert reads <= set(access.reads)
    assert set(access.reads) - reads <= set(access.writes), "it may read back only what it writes"


def test_the_list_in_ops_is_the_printed_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["topics", "acl", "--format", "json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    stored = json.loads((ROOT / "ops" / "acl" / "kat-stream.json").read_text())
    assert stored == printed, "make it again: kat-stream topics acl --format json > ops/acl/kat-stream.json"


def test_commands_are_kafka_acls_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["topics", "acl", "--service", "packer"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "--add --allow-principal User:kat-packer --operation Write --topic kat.batches" in lines
    assert lines[-1].endswith("--operation Write --transactional-id kat. --resource-pattern-type prefixed")
    assert not any("kat.turns" in line for line in lines)


def test_no_service_may_do_more_than_it_says() -> None:
    for service in SERVICES.keys() - {"run"}:
        operations = {rule.operation for rule in rules_of(service, "kat.")}
        assert not operations & {"Create", "AlterConfigs"}, service


def test_an_unknown_service_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"no service `pakcer`.*sampler, gateway"):
        rules_of("pakcer", "kat.")
