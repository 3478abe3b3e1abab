"""The command line on a fabricated run: words, exit codes, and what is never imported."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from kat_stream.archive import ArchiveWriter
from kat_stream.cli import main
from kat_stream.cli.main import build_parser
from tests import observe_kit as fab
from tests.observe_kit import FabricatedRun
from topics import CATALOGUE

LEDGER = """\
requested               20
  trained                4
  filtered               2
    equal_rewards        2
  stale                  2
  failed                 2
    SandboxUnavailable   1
    VerifierError        1
  cancelled              1
  evaluated              7
  in flight              2
    requested            1
    graded               1
the topic ledger says: cancelled 1, failed 1, filtered 2, requested 2, stale 2, trained 4
the account closes: 20 = 20
"""


def all_commands(parser: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every command and every command group, as typed."""
    found = [words]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                found += all_commands(inner, (*words, name))
    return found


@pytest.mark.parametrize("words", all_commands(build_parser()), ids=" ".join)
def test_every_command_has_help_with_examples(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--help"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: {' '.join(('kat-stream', *words))}")
    assert "examples:" in said or "COMMAND" in said


def test_without_a_command_the_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "kat-stream demo" in capsys.readouterr().out


def test_the_ledger_of_a_run(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ledger", str(run_dir)]) == 0
    head, _, account = capsys.readouterr().out.partition("\n")
    assert head == f"run demo, from {run_dir}/archive"
    assert account == LEDGER


def test_the_ledger_as_json_and_its_names(
    run_dir: Path, small_run: FabricatedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ledger", "demo", "--json"]) == 0
    account = json.loads(capsys.readouterr().out)
    assert (account["requested"], account["closes"], account["failed"]["VerifierError"]) == (20, True, 1)
    assert account["topic_ledger"]["trained"] == account["trained"] == 4
    assert main(["ledger", "latest", "--names", "in-flight:graded"]) == 0
    assert capsys.readouterr().out.split() == small_run.by_fate["graded"]


def test_a_ledger_that_does_not_close_fails(
    run_dir: Path, small_run: FabricatedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    again = fab.FabricatedRun()
    again.records = [*small_run.records, (fab.step(3, ["demo-t000001"], ["demo-t000001-0"]), fab.START_MS + 99_000)]
    writer = ArchiveWriter(run_dir / "archive")
    for delivered in again.delivered():
        writer.add(delivered)
    writer.flush()
    assert main(["ledger"]) == 1
    assert "demo-t000001-0: trained in steps [1, 3]" in capsys.readouterr().out


def test_tail_reads_an_archive_by_time(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tail", "rewards", "-n", "2"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert (first[:12], second[:12]) == ("14:13:20.900", "14:13:21.300")
    assert main(["tail", "rewards", "--from", "latest", "-n", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["value"]["rollout_id"] == "demo-e00002-0003-0"
    assert main(["tail", "turns", "--rollout", "demo-t000001-1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_trace_tells_the_story(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "demo-t000001-1", "--run", "demo"]) == 0
    said = capsys.readouterr().out
    assert "    > mv a b\n" in said
    assert said.endswith("fate: trained in step 1\n")


def test_trace_of_a_group_prints_positions_and_gaps(
    run_dir: Path, small_run: FabricatedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["trace", "demo-t000001", "--run", "demo"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "group demo-t000001"
    places = {f"{d.position.topic}[{d.position.partition}] at {d.position.offset}" for d in small_run.delivered()}
    placed = [line for line in lines if ": " in line and "] at " in line and line[2] == ":"]
    assert len(placed) > 3
    assert all(line[13:].partition(": ")[0] in places for line in placed)
    assert "ledger[" in "".join(placed) and "turns[" in "".join(lines)


def test_plot_writes_both_files(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", "latest"]) == 0
    assert capsys.readouterr().out.split() == ["runs/demo/plot.png", "runs/demo/plot.html"]
    assert (run_dir / "plot.html").read_text().count("<svg") == 1


def test_dead_letters_of_a_healthy_run(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dead-letters", "list"]) == 0
    assert capsys.readouterr().out == "no dead letters\n"


def test_topics_list_names_the_whole_catalogue(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["topics", "list"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert names[:3] == ["tasks", "rollout.requests", "turns"]
    assert len(names) == len(CATALOGUE)


@pytest.mark.parametrize("kind", ["datasets", "scaffolds", "sandboxes", "verifiers"])
def test_plugins_are_listed_with_what_they_are(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([kind, "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines
    assert all(len(line.split(maxsplit=1)) == 2 for line in lines)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["nonsense"], 2, "invalid choice: 'nonsense'"),
        (["tail"], 2, "the following arguments are required: TOPIC"),
        (["tail", "trajectory"], 2, "no topic `trajectory`"),
        (["ledger", "nobody"], 2, "no run `nobody`"),
        (["ledger", "--names", "dead"], 2, "--names dead: no such state"),
        (["trace", "nobody"], 1, "no record speaks of a rollout or a group `nobody`"),
        (["tail", "turns", "--log", "amqp:here"], 2, "neither memory: nor kafka:"),
        (["tail", "turns", "--log", "kafka:127.0.0.1:1"], 75, "127.0.0.1:1"),
        (["topics", "diff"], 2, "the log is memory:"),
        (["plot", "--set", "run.stepz=3"], 2, "did you mean `run.steps`"),
    ],
)
def test_errors_are_one_clear_line_and_a_code(
    run_dir: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, said: str
) -> None:
    assert main(words) == code
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_debug_shows_where_an_error_came_from(run_dir: Path) -> None:
    from kat_stream.errors import DataError

    with pytest.raises(DataError, match="no record speaks"):
        main(["trace", "nobody", "--debug"])


def test_a_run_that_has_written_nothing_says_so(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    shutil.rmtree(run_dir / "archive")
    assert main(["ledger"]) == 1
    assert "nothing is archived yet" in capsys.readouterr().err


def test_a_closed_pipe_is_quiet(run_dir: Path) -> None:
    command = f"{sys.executable} -m kat_stream.cli tail ledger --json | head -n 1"
    done = subprocess.run(command, shell=True, cwd=run_dir.parents[1], capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout)["topic"] == "ledger"
    assert done.stderr == ""


@pytest.mark.parametrize("words", [["topics", "list"], ["tail", "turns"], ["ledger"], ["trace", "demo-t000001-1"]])
def test_watching_never_loads_torch(run_dir: Path, words: list[str]) -> None:
    program = (
        "import sys\nfrom kat_stream.cli import main\n"
        f"assert main({words!r}) == 0\n"
        "heavy = {'torch', 'transformers', 'aiodocker', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=run_dir.parents[1], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["kat_stream.cli.common", "kat_stream.cli.tail"])
def test_ctrl_c_while_a_command_is_still_imported_ends_it_without_a_traceback(module: str) -> None:
    program = (
        "import sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {module!r}:\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "sys.argv[1:] = ['tail', 'turns']\n"
        "from kat_stream.cli import console\n"
        "console()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "")
