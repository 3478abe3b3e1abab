"""What a user gets wrong on the command line is one line that names it, said before any work is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from kat_stream.cli import lag, main, tail, topics
from kat_stream.cli.broker import running_meanwhile
from kat_stream.cli.common import duration
from kat_stream.cli.eval import _Rows
from kat_stream.cli.run import INTERRUPTED, close
from kat_stream.env.evaluation import Result
from kat_stream.errors import ConfigError, LogUnavailable
from kat_stream.execute import Result as RunResult
from kat_stream.log import Group, MemoryLog, broker
from kat_stream.log.kafka_topics import Difference
from kat_stream.observe.sources import LogSource
from kat_stream.runs import worked_on
from topics import CATALOGUE

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
    "words", [("lag", "--log", "kafka:here:1", "--serve"), ("broker", "up", "--port")], ids=" ".join
)
def test_a_port_is_one(words: tuple[str, ...], run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "70000"]) == 2
    assert f"{words[-1]}: 70000: expected 0 to 65535" in capsys.readouterr().err


@pytest.mark.parametrize("words", [("dead-letters", "replay", "--since"), ("blobs", "list", "--grace")], ids=" ".join)
def test_a_duration_is_a_number_and_a_unit(
    words: tuple[str, ...], run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for text in ("soon", "2", "2 h", ""):
        assert main([*words, text]) == 2
        assert f"{words[-1]}: {text!r} is no time" in capsys.readouterr().err
    assert [duration(text) for text in ("90s", "1.5h", "7d")] == [90.0, 5400.0, 604_800.0]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ((*EVAL, "--json", "/no/dir/x.json"), 1, "/no/dir/x.json: cannot be written (No such file or directory)"),
        (("export", "latest", "--out", A_FILE), 1, f"{A_FILE}/train.parquet cannot be written"),
        (("sft", "--set", "sft.data=x.jsonl", "--set", "sft.out=runs"), 2, "sft.out: runs exists already"),
        (("sft", "--set", "sft.data=x.jsonl", "--set", f"sft.out={A_FILE}/x/y"), 1, "cannot be written (Not a dir"),
        (("datasets", "write", A_FILE), 1, "cannot be written (Not a directory)"),
        (("tail", "turns", "--log", "kafka:here:abc"), 2, "'abc' is no port"),
        (("tail", "turns", "--log", "kafka:here:1,there:99999"), 2, "'99999' is no port"),
        (("broker", "up", "--port", "65535", "--nodes", "2", "--state-dir", "state"), 2, "port 65536 of node 2"),
        (("trace", ""), 2, "ID is empty"),
        (("run", "--set", f"run.name={LONG}"), 1, "can be made (File name too long)"),
        (("run", "--set", "run.name=.."), 2, "run.name: '..': expected letters, digits, - and _"),
        (("run", "--set", "run.name=demo.packer"), 2, "run.name: 'demo.packer'"),
        (("run", "--set", "run.name=latest"), 2, "not `latest`"),
        (("run", "--set", "run.name=demo"), 2, "`kat-stream run --resume runs/demo` goes on with it"),
        (("run", "--set", "log.url=redis:here"), 2, "neither memory: nor kafka:"),
        (("run", "--set", "policy.model=/nope"), 2, "/nope is no Hugging Face model directory"),
        (("run", "--set", "data.train=nope:x"), 2, "no 'nope'"),
        (("run", "--set", "data.held_out=mend:x"), 2, "split 'x' is not one of"),
        (("run", "--set", "data.scaffold=nope"), 2, "no 'nope'"),
        (("run", "--set", "rollout.sandbox=nope"), 2, "nope"),
        (("run", "--set", "trainer.loss=nope"), 2, "no 'nope'"),
        (("demo", "--set", "trainer.loss=nope"), 2, "no 'nope'"),
        (("run", "--set", "run.directory=\udcff", "--dry-run"), 2, "not UTF-8"),
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
    assert [path.name for path in Path("runs").iterdir()] == ["demo"]


def test_a_dry_run_of_a_resume_prints_and_changes_nothing(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run_dir / "config.toml"
    before, written = path.read_text(), path.stat().st_mtime_ns
    assert main(["run", "--resume", "demo", "--dry-run"]) == 0
    assert capsys.readouterr().out == before == path.read_text()
    assert path.stat().st_mtime_ns == written


def test_a_second_run_of_a_folder_is_refused_and_changes_nothing(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run_dir / "config.toml").read_text()
    with worked_on(run_dir):
        assert main(["run", "--resume", "demo"]) == 2
    assert "another `kat-stream run` works on it" in capsys.readouterr().err
    assert (run_dir / "config.toml").read_text() == before


class Flaky(MemoryLog):
    """There, away, there again; then the test is over."""

    def __init__(self) -> None:
        super().__init__()
        self.answers = iter([None, LogUnavailable("the broker is gone"), None, ConfigError("over")])

    async def groups(self) -> list[Group]:
        answer = next(self.answers)
        if answer is not None:
            raise answer
        return []


def test_who_watches_lag_sees_a_log_go_and_come_back(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lag, "broker_log", lambda args: Flaky())
    monkeypatch.setattr(lag, "WATCH_S", 0.0)
    assert main(["lag", "--log", "kafka:here:1", "--watch"]) == 2
    said = capsys.readouterr()
    assert said.out == "no consumer groups\n" * 2
    assert said.err == "lag is not known: the broker is gone\nkat-stream lag: over\n"


def test_output_that_is_closed_from_the_start_is_no_failure(run_dir: Path) -> None:
    command = f"{sys.executable} -m kat_stream.cli ledger latest >&-"
    done = subprocess.run(command, shell=True, cwd=run_dir.parents[1], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_an_evaluation_has_done_is_in_its_file_after_each_task(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("of another evaluation")
    rows = _Rows(path)
    assert path.read_text() == "of another evaluation"  # until this one has something to say
    done = [Result("a", 1.0, "completed", 0.5), Result("b", None, "infra_error", 2.0), Result("ç", 0.0, "nop", 1.0)]
    for count, result in enumerate(done, 1):
        rows.add(result)
        assert json.loads(path.read_text()) == [one.as_row() for one in done[:count]]


def test_topics_with_too_few_copies_are_left_to_the_operator_who_is_told_what_to_do() -> None:
    few = [Difference(name, "replicas", "2", "3") for name in ("tasks", "turns")]
    *lines, told = topics.done([*few, Difference("rewards", "missing")], "")
    assert lines == [
        "! tasks: replicas 2, the catalogue says 3",
        "! turns: replicas 2, the catalogue says 3",
        "created rewards",
    ]
    assert told.startswith("2 topics have fewer copies") and "kafka-reassign-partitions" in told
    assert topics.advice([Difference("rewards", "missing")]) == []


class Away(Flaky):
    """As it, asked for a topic's end. Nothing comes on it."""

    async def end_offsets(self, topic: str) -> dict[int, int]:
        await self.groups()
        return {}


def test_who_tails_is_told_once_that_the_log_is_away_and_that_it_is_back(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    @asynccontextmanager
    async def source() -> AsyncIterator[LogSource]:
        log = Away()
        log.answers = iter([None, *[LogUnavailable("gone")] * 3, None, ConfigError("over")])
        await log.apply_topics(CATALOGUE)
        yield LogSource(log, "kafka:here:1", "")

    monkeypatch.setattr(tail, "where", lambda args: SimpleNamespace(source=source))
    monkeypatch.setattr(tail, "QUIET_S", 0.0)
    monkeypatch.setattr(tail, "POLL_S", 0.0)
    assert main(["tail", "turns"]) == 2
    away, back, over = capsys.readouterr().err.splitlines()
    assert away == "kat-stream tail: kafka:here:1 does not answer; tail waits for it, Ctrl-C ends"
    assert back == "kat-stream tail: kafka:here:1 answers again"
    assert over == "kat-stream tail: over"


def test_a_full_disk_is_one_line(run_dir: Path) -> None:
    command = f"{sys.executable} -m kat_stream.cli topics list > /dev/full"
    done = subprocess.run(command, shell=True, cwd=run_dir.parents[1], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "kat-stream topics: cannot write: No space left on device\n")


@pytest.mark.parametrize("words", [("run",), ("demo",), ("serve", "rollout")], ids=" ".join)
def test_debug_is_an_option_of_every_command(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--help"]) == 0
    assert "--debug" in capsys.readouterr().out


def test_who_interrupts_a_run_waits_for_its_steps_alone(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An archive has gigabytes of turns; here they could not even be read."""
    for path in (run_dir / "archive" / "turns").rglob("*.parquet"):
        path.write_bytes(b"not to be opened")
    assert close("run", RunResult(seconds=1.0, interrupted=True), run_dir) == INTERRUPTED
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
