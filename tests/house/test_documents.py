"""The documents name only what exists: commands with their options, settings, metrics, modules, files."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from kat_stream.cli.main import build_parser
from kat_stream.config import Config, Section
from tests.house.test_ops_files import exported

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    [ROOT / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")]
    + list(ROOT.glob("ops/runbooks/*.md"))
)
EXAMPLE = re.compile(r"^ *```(?s:.*?)^ *```|^ {4}.*$", re.MULTILINE)
COMMAND = re.compile(r"^ *(?:\$ )?(?:\.venv/bin/)?kat-stream (.+)$", re.MULTILINE)
OTHERS = {"rollout.requests", "policy.versions", "verifier.in_place", "run.env", "run.files", "policy.decode"}
"""Topics, fields of records, keys of a scaffold's TOML and methods, which begin like sections of the configuration."""


def commands(text: str) -> Iterator[str]:
    """Without the words beside them, the pipe behind them and what stands for a number."""
    for line in COMMAND.findall("\n".join(re.findall(EXAMPLE, text))):
        yield re.split(r" {2,}| #| \| ", line)[0]


def settings(kind: type[Section] = Config, prefix: str = "") -> Iterator[str]:
    for key, hint in get_type_hints(kind).items():
        yield prefix + key
        for one in (hint, *get_args(hint)):
            if isinstance(one, type) and issubclass(one, Section):
                yield from settings(one, f"{prefix}{key}.")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_is_one(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in commands(path.read_text()):
        words = shlex.split(command)
        try:
            build_parser(words).parse_args(words)
        except SystemExit as stop:
            assert stop.code == 0, f"{command}: {capsys.readouterr().err}"


def test_commands_were_found() -> None:
    assert sum(len(list(commands(path.read_text()))) for path in DOCUMENTS) > 30


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_setting_metric_module_and_file_is_there(path: Path) -> None:
    text, known = path.read_text(), set(settings())
    sections = "|".join(key for key in known if "." not in key)
    named = set(re.findall(rf"(?<![\w./-])((?:{sections})(?:\.[a-z_]+)+)\b(?!\()", text))
    assert named - known - OTHERS == set()
    metrics = {re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"\bkat_(?!stream)[a-z_]+", text)}
    assert metrics - {re.sub(r"_(bucket|sum|count)$", "", name) for name in exported()} == set()
    assert [name for name in re.findall(r"python -m ([\w.]+)", text) if find_spec(name) is None] == []
    files = re.findall(r"\]\(([^)#\s:]+)(?:#[^)]*)?\)", text)
    assert [name for name in files if not (path.parent / name).exists()] == []
