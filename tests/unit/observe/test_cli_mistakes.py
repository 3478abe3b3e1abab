"""What a user gets wrong on the command line is one line that names it, said before any work is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from kat_stream.cli import main
from kat_stream.cli.broker import running_meanwhile
from kat_stream.cli.run import INTERRUPTED, close
from kat_stream.errors import ConfigError
from kat_stream.execute import Result
from kat_stream.log import broker

EVAL = ("eval", "--dataset", "mend:held-out?count=1", "--agent", "nop")
A_FILE = "runs/demo/config.toml"
LONG = "x" * 300


@pytest.mark.parametrize(
    "words",
    [
        ("tail", "turns", "-n", "-3"),
        (*EVAL, "--concurrency", "0"),
        (*EVAL, "--limit", "-1"),
        ("datasets", "check", "mend:held-out", "--concurrency", "-1"),
        ("datasets", "write", "mend", "--count", "-1"),
        ("export", "latest", "--out", "out", "--max-tokens", "0"),
        ("export", "latest", "--out", "out", "--max-turns", "-1"),
        ("gateway", "verify", "--conversations", "0"),
        ("replay", "latest", "--step", "0"),
    ],
    ids=" ".join,
)
def test_how_many_is_at_least_one(words: tuple[str, ...], run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert f"{words[-2]}: {words[-1]}: expected at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ((*EVAL, "--json", "/no/dir/x.json"), 1, "/no/dir/x.json: cannot be written (No such file or directory)"),
        (("export", "latest", "--out", A_FILE), 1, f"{A_FILE}/train.parquet cannot be written"),
        (("datasets", "write", A_FILE), 1, "cannot be written (Not a directory)"),
        (("tail", "turns", "--log", "kafka:here:abc"), 2, "'abc' is no port"),
        (("tail", "turns", "--log", "kafka:here:1,there:99999"), 2, "'99999' is no port"),
        (("broker", "up", "--port", "99999", "--state-dir", "state"), 2, "port 99999 of node 1 is not between"),
        (("broker", "up", "--port", "65535", "--nodes", "2", "--state-dir", "state"), 2, "port 65536 of node 2"),
        (("trace", ""), 2, "ID is empty"),
        (("run", "--set", f"run.name={LONG}"), 1, "can be made (File name too long)"),
        (("ledger", LONG), 2, "no run `xxx"),
        (("run", "latin.toml", "--dry-run"), 2, "latin.toml: not valid TOML"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_line(
    words: tuple[str, ...], code: int, said: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("latin.toml").write_bytes('[run]\nname = "caf\u00e9"\n'.encode("latin-1"))
    assert main(words) == code
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1


def test_a_dry_run_of_a_resume_prints_and_changes_nothing(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run_dir / "config.toml"
    before, written = path.read_text(), path.stat().st_mtime_ns
    assert main(["run", "--resume", "demo", "--dry-run"]) == 0
    assert capsys.readouterr().out == before == path.read_text()
    assert path.stat().st_mtime_ns == written


def test_who_interrupts_a_run_waits_for_its_steps_alone(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An archive has gigabytes of turns; here they could not even be read."""
    for path in (run_dir / "archive" / "turns").rglob("*.parquet"):
        path.write_bytes(b"not to be opened")
    assert close("run", Result(seconds=1.0, interrupted=True), run_dir) == INTERRUPTED
    assert "stopped at step 2; go on with:" in capsys.readouterr().out


@pytest.mark.parametrize("was_up", [True, False])
def test_a_broker_is_stopped_only_by_who_started_it(was_up: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(broker, "status", lambda directory: broker.Status(running=was_up, bootstrap="here:1"))
    monkeypatch.setattr(broker, "up", lambda directory: calls.append("up") or "here:1")
    monkeypatch.setattr(broker, "down", lambda directory: calls.append("down"))
    with pytest.raises(ConfigError), running_meanwhile() as bootstrap:
        assert bootstrap == "here:1"
        raise ConfigError("the run cannot begin")
    assert calls == (["up"] if was_up else ["up", "down"])
