"""Every service file says, in the same five lines, what it reads, writes and commits, and how it fails."""

import ast
import re
import subprocess
import sys
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SERVICES = sorted(path for room in ("producers", "consumers") for path in (ROOT / room).glob("[a-z]*.py"))
ROOMS = ("topics", "kat_stream", "producers", "consumers")


@pytest.mark.parametrize("path", SERVICES, ids=lambda path: path.stem)
def test_a_service_opens_with_its_contract(path: Path) -> None:
    header = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[2]
    names = re.findall(r"^(\w+): +\S", header, re.MULTILINE)
    assert names == ["In", "Out", "Key", "Commits", "Fails"]


def test_every_service_file_is_registered_and_every_name_has_a_file() -> None:
    registered = {entry.value.partition(":")[0] for entry in entry_points(group="kat_stream.services")}
    assert registered == {f"{path.parent.name}.{path.stem}" for path in SERVICES}


def test_every_module_says_what_it_is() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
        if not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert silent == []


def test_architecture_names_only_what_exists() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    names = re.findall(r"`((?:topics|kat_stream|producers|consumers)(?:\.\w+)+:[\w.]+)`", text)
    assert len(names) >= 12
    for name in names:
        module, _, attribute = name.partition(":")
        found = import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)


@pytest.mark.parametrize(
    ("module", "banned"),
    [
        ("topics", {"torch", "aiokafka", "aiohttp", "anyio", "numpy"}),
        ("kat_stream.cli", {"torch", "transformers", "aiokafka"}),
        ("kat_stream.trees", {"torch", "aiokafka", "aiohttp"}),
        ("kat_stream.log", {"torch", "aiokafka"}),
    ],
)
def test_an_import_stays_slim(module: str, banned: set[str]) -> None:
    code = f"import sys, {module}; print(*sorted({banned!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == []


def test_no_registry_or_host_of_this_machine_is_named() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    hosts = re.compile(r"pypi\.org|pythonhosted|registry\.npmjs|repo\.maven|repo1\.maven|deb\.debian\.org")
    guilty = [
        name
        for name in tracked.stdout.split()
        if (ROOT / name).suffix in (".txt", ".toml", ".xml", ".json", ".sh", ".lock", "") and (ROOT / name).is_file()
        if hosts.search((ROOT / name).read_text(errors="ignore"))
    ]
    assert guilty == []
