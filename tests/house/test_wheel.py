"""The wheel holds every room and runs outside the checkout."""

import subprocess
import sys
import venv
from importlib.metadata import entry_points
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("topics", "kat_stream", "producers", "consumers")
SERVICES = sorted(entry.name for entry in entry_points(group="kat_stream.services"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def outside(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel in it; the dependencies are borrowed from ours, the checkout is not."""
    home = tmp_path_factory.mktemp("outside")
    venv.create(home / "env", with_pip=False)
    python = home / "env" / "bin" / "python"
    site = next((home / "env" / "lib").glob("python*/site-packages"))
    with ZipFile(wheel) as archive:
        archive.extractall(site)
    ours = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "borrowed.pth").write_text(f"import sys; sys.path.append({ours!r})\n")
    where = "import topics, kat_stream.config, consumers, producers; print(kat_stream.config.__file__)"
    done = subprocess.run([python, "-c", where], capture_output=True, text=True, timeout=120, cwd=home, check=True)
    assert str(home) in done.stdout
    return python


def test_the_wheel_holds_exactly_the_rooms(wheel: Path) -> None:
    inside = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    tracked = subprocess.run(
        ["git", "ls-files", *ROOMS], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
    )
    assert inside == {name for name in tracked.stdout.split() if (ROOT / name).is_file()}


@pytest.mark.parametrize("service", SERVICES)
def test_every_service_starts_its_help_outside_the_checkout(outside: Path, service: str) -> None:
    command = [outside, "-m", "kat_stream.cli", "serve", service, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=outside.parent)
    assert done.returncode == 0, done.stderr
    assert all(f"{word}:" in done.stdout for word in ("In", "Out", "Key", "Commits", "Fails"))


def test_every_service_imports_outside_the_checkout(outside: Path) -> None:
    code = "import sys; from kat_stream.service import load_service\n"
    code += "for name in sys.argv[1:]: print(type(load_service(name)).__module__)"
    done = subprocess.run(
        [outside, "-c", code, *SERVICES], capture_output=True, text=True, timeout=240, cwd=outside.parent
    )
    assert done.returncode == 0, done.stderr
    modules = done.stdout.split()
    assert len(modules) == len(SERVICES)
    assert {module.partition(".")[0] for module in modules} == {"producers", "consumers"}
