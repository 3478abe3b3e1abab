"""An agent that comes from a git repository: a commit is what is installed, once, and where it came from is forgotten.

The repository is of this test, under an address that only git's own `insteadOf` leads to: the way of a user's machine.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from kat_stream.cli.main import main
from kat_stream.env.scaffolds.description import read_description
from kat_stream.env.scaffolds.install import installed
from kat_stream.errors import ConfigError
from tests.contract.env_kit import backend, first_task, graded, harbor_task, needs_bwrap, request, roll, write
from tests.contract.gateway_kit import saying, world

pytestmark = pytest.mark.anyio

ADDRESS = "https://code.invalid/their/agent"
AGENT = '''"""An agent of this test: asks once, does what the reply says, and keeps its state where it always did."""
import json, os, subprocess, sys, urllib.request
from pathlib import Path
import theirs.tools
base, instruction = sys.argv[1:]
body = json.dumps({"model": "m", "messages": [{"role": "user", "content": instruction}]}).encode()
headers = {"Authorization": "Bearer " + os.environ["KEY"], "Content-Type": "application/json"}
reply = json.load(urllib.request.urlopen(urllib.request.Request(base + "/chat/completions", body, headers)))
subprocess.run(reply["choices"][0]["message"]["content"], shell=True)
Path("/root/state").write_text(theirs.tools.SAYS)
print(Path("/root/state").read_text())
'''
TOML = f"""
name = "theirs"
version = "COMMIT"
[install]
packages = []
[install.git]
url = "{ADDRESS}"
directories = ["theirs"]
[run]
command = [
    "/opt/python/bin/python3", "-I", "-c",
    "import sys, runpy; sys.path.insert(0, '{{agent}}/checkout'); runpy.run_module('theirs', run_name='__main__')",
    "{{base_url}}", "{{instruction}}",
]
[run.env]
KEY = "{{key}}"
LD_LIBRARY_PATH = "/opt/python/lib"
[needs]
memory_mb = 64
pids = 16
writable = ["/root"]
[outcome.exit]
0 = "submitted"
"""


class Repository:
    """Somebody's, with a tag."""

    def __init__(self, place: Path) -> None:
        self.place = place
        place.mkdir()
        self.git("init", "-q")
        # As code hosts do: who asks gets a commit without its files, and then those that are wanted.
        self.git("config", "uploadpack.allowFilter", "true")

    def git(self, *words: str) -> str:
        who = ["-c", "user.name=they", "-c", "user.email=they@code.invalid"]
        done = subprocess.run(["git", *who, *words], cwd=self.place, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    def release(self, says: str) -> str:
        """A commit that the tag `v1` names from now on."""
        tools = {"theirs/__init__.py": "", "theirs/__main__.py": AGENT, "theirs/tools.py": f"SAYS = {says!r}\n"}
        write(self.place, {**tools, "tests/large.bin": f"{says} and much more"})
        self.git("add", "-A")
        self.git("commit", "-q", "-m", says)
        self.git("tag", "-f", "v1")
        return self.git("rev-parse", "HEAD")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    made = Repository(tmp_path / "repository")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", f"url.{made.place.as_uri()}.insteadOf")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", ADDRESS)
    return made


def described(tmp_path: Path, version: str, name: str = "theirs") -> Path:
    text = TOML.replace("COMMIT", version).replace('name = "theirs"', f'name = "{name}"')
    return write(tmp_path, {f"{name}.toml": text}) / f"{name}.toml"


@needs_bwrap
async def test_the_pinned_commit_works_where_nothing_can_be_fetched(tmp_path: Path, repository: Repository) -> None:
    pinned = repository.release("the first")
    repository.release("another one under the same tag")
    agent = described(tmp_path, pinned)
    assert main(["scaffolds", "install", str(agent)]) == 0
    repository.place.rename(tmp_path / "gone")
    harbor_task(tmp_path / "tasks")
    task = first_task(f"harbor:{tmp_path / 'tasks'}", scaffold=str(agent))
    async with backend() as sandboxes, world(saying("echo fixed > state.txt")) as gateway:
        trajectory = await roll(sandboxes, request(task), gateway)
        reward = await graded(sandboxes, trajectory)
    assert (trajectory.outcome, trajectory.log) == ("submitted", "the first\n"), trajectory.detail
    assert reward.score == 1.0


def test_only_the_directories_that_are_wanted_are_fetched(tmp_path: Path, repository: Repository) -> None:
    pinned = repository.release("it")
    blob = repository.git("rev-parse", "HEAD:tests/large.bin")
    (repository.place / ".git" / "objects" / blob[:2] / blob[2:]).unlink()
    assert main(["scaffolds", "install", str(described(tmp_path, pinned))]) == 0
    assert [path.name for path in (installed("theirs", pinned) / "checkout").iterdir()] == ["theirs"]


@pytest.mark.parametrize("version", ["v1", "main", "3ea751c", "3EA751C087F32B16E039A2233DD6EEFECEF325D5"])
def test_what_can_move_is_no_version_of_it(tmp_path: Path, version: str) -> None:
    with pytest.raises(ConfigError, match=f"theirs.toml: version '{version}' is no commit"):
        read_description(described(tmp_path, version))
    with pytest.raises(ConfigError, match=f"version '{version}' is no commit"):
        read_description(described(tmp_path, "0" * 40), version)


@pytest.mark.parametrize("lacks", ["the address", "the commit"])
def test_what_cannot_be_fetched_is_named_and_the_others_are_installed(
    tmp_path: Path, repository: Repository, lacks: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good, pinned = described(tmp_path, repository.release("it"), "ours"), "0" * 40
    agent = described(tmp_path, pinned)
    if lacks == "the address":
        write(tmp_path, {"theirs.toml": agent.read_text().replace(ADDRESS, f"{tmp_path.as_uri()}/nowhere")})
    assert main(["scaffolds", "install", str(agent), str(good)]) == 2
    said = capsys.readouterr()
    address = ADDRESS if lacks == "the commit" else f"{tmp_path.as_uri()}/nowhere"
    assert f"theirs (in no package registry; from {address}, commit {pinned}): git fetch" in said.err
    assert said.out.startswith(f"{good}: ")
    assert not list((tmp_path / "cache" / "kat-stream" / "agents").glob("theirs/*"))
