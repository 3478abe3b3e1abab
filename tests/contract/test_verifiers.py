"""Grading: a clean sandbox, tests that come last, a score only for the work, a failure only for the grader."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kat_stream.env.datasets import Files, open_dataset
from kat_stream.env.sandboxes.base import Sandbox
from kat_stream.env.verifiers import Verdict
from kat_stream.errors import ConfigError
from tests.contract.env_kit import (
    backend,
    exercise,
    finished,
    first_task,
    graded,
    harbor_task,
    needs_bwrap,
    write,
)
from topics import Reward, Task

pytestmark = [pytest.mark.anyio, needs_bwrap]

PATCH = b"""diff --git a/state.txt b/state.txt
--- a/state.txt
+++ b/state.txt
@@ -1 +1 @@
-broken
+fixed
"""
SCRIPT = "#!/bin/sh\nmkdir -p /logs/verifier\n"


async def grade(task: Task, patch: bytes = PATCH, outcome: str = "submitted") -> Reward:
    async with backend() as sandboxes:
        return await graded(sandboxes, finished(task, patch, outcome))


def with_test(tmp_path: Path, script: str, **verifier: Any) -> Task:
    harbor_task(tmp_path, files={"tests/test.sh": script})
    task = first_task(f"harbor:{tmp_path}")
    return msgspec.structs.replace(task, verifier=msgspec.structs.replace(task.verifier, **verifier))


def with_command(tmp_path: Path, command: str, timeout_s: float = 20.0, **options: str) -> Task:
    return with_test(tmp_path, SCRIPT, name="command", command=command, timeout_s=timeout_s, options=options)


@pytest.mark.parametrize(
    ("wrote", "score", "components"),
    [
        ("echo 1 > $R.txt", 1.0, {"reward": 1.0}),
        ("echo 0.25 > $R.txt; echo '{\"a\": 1}' > $R.json", 0.25, {"reward": 0.25}),
        ('echo \'{"reward": 0.5, "style": 1}\' > $R.json', 0.5, {"reward": 0.5, "style": 1.0}),
        ('echo \'{"builds": true, "tests": 0.5}\' > $R.json', 0.75, {"builds": 1.0, "tests": 0.5}),
    ],
)
async def test_the_score_is_what_the_tests_wrote(
    tmp_path: Path, wrote: str, score: float, components: dict[str, float]
) -> None:
    task = with_test(tmp_path, f"{SCRIPT}R=/logs/verifier/reward\necho seen\n{wrote}\nexit 3\n")
    reward = await grade(task)
    assert (reward.status, reward.score, reward.components) == ("graded", score, components)
    assert (reward.verifier, reward.evidence) == ("harbor", "seen\n")


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exit 1\n", "wrote neither"),
        ("echo much > /logs/verifier/reward.txt\n", "could not convert"),
        ("echo nan > /logs/verifier/reward.txt\n", "not a finite number"),
        ("echo '{}' > /logs/verifier/reward.json\n", "not a finite number"),
        ('echo \'{"a": "b"}\' > /logs/verifier/reward.json\n', "got `str`"),
        ("kill -9 $$\n", "wrote neither"),
    ],
)
async def test_a_verifier_that_crashes_is_failed_and_never_0(tmp_path: Path, script: str, reason: str) -> None:
    reward = await grade(with_test(tmp_path, SCRIPT + script))
    assert (reward.status, reward.error_class) == ("failed", "VerifierError")
    assert reason in reward.evidence


async def test_the_tests_find_an_empty_place_for_their_reward(tmp_path: Path) -> None:
    script = "#!/bin/sh\nls -A /logs/verifier\necho 1 > /logs/verifier/reward.txt\n"
    reward = await grade(with_test(tmp_path, script))
    assert (reward.score, reward.evidence) == (1.0, "")


async def test_a_verifier_that_never_ends_is_failed(tmp_path: Path) -> None:
    reward = await grade(with_test(tmp_path, SCRIPT + "sleep 100\n", timeout_s=0.5))
    assert (reward.status, reward.error_class) == ("failed", "VerifierError")
    assert "longer than 0.5 s" in reward.evidence


async def test_a_sandbox_that_dies_under_the_tests_is_failed(tmp_path: Path) -> None:
    reward = await grade(with_test(tmp_path, SCRIPT + "kill -9 -1\n"))
    assert reward.status == "failed"
    assert reward.error_class in ("SandboxDied", "VerifierError")


async def test_the_work_is_graded_in_a_clean_sandbox_with_the_tests_last(tmp_path: Path) -> None:
    script = f"{SCRIPT}ls / /tests > /dev/null; test -e /tests/test.sh && ls -A; grep -c fixed state.txt > "
    reward = await grade(with_test(tmp_path, f"{script}/logs/verifier/reward.txt\n"))
    assert (reward.score, reward.evidence) == (1.0, "state.txt\n")


async def test_a_patch_that_does_not_apply_scores_0_with_evidence(tmp_path: Path) -> None:
    reward = await grade(with_command(tmp_path, "true"), PATCH.replace(b"broken", b"other"))
    assert (reward.status, reward.score) == ("graded", 0.0)
    assert "patch does not apply" in reward.evidence


@pytest.mark.parametrize(
    ("command", "score"),
    [
        ("(true)", 1.0),
        ("grep -q fixed state.txt", 1.0),
        ("grep -q broken state.txt", 0.0),
        ('test -x "$TESTS/test.sh"', 0.0),
    ],
)
async def test_a_command_scores_by_its_exit_code(tmp_path: Path, command: str, score: float) -> None:
    reward = await grade(with_command(tmp_path, command))
    assert (reward.status, reward.score, reward.components) == ("graded", score, {"passed": score})
    assert reward.evidence == f"[exit {int(score == 0)}]"


@pytest.mark.parametrize("command", ["no-such-program", "A=1 no-such-program", '"$TESTS/absent.sh"', "/opt/no/program"])
async def test_a_command_that_cannot_be_run_is_failed(tmp_path: Path, command: str) -> None:
    reward = await grade(with_command(tmp_path, command))
    assert (reward.status, reward.error_class) == ("failed", "VerifierError")


@pytest.mark.parametrize(
    "command", ["sh -c 'exit 127'", "A=1 sh -c 'exit 126'", "./build.sh", "'/app/build.sh'", "sh state.txt"]
)
async def test_work_that_ends_as_if_it_could_not_be_run_scores_0(tmp_path: Path, command: str) -> None:
    reward = await grade(with_command(tmp_path, command))
    assert (reward.status, reward.score, reward.error_class) == ("graded", 0.0, "")


async def test_a_timeout_is_the_works_own_only_where_the_task_says_so(tmp_path: Path) -> None:
    ours = await grade(with_command(tmp_path, "sleep 100", 0.3))
    theirs = await grade(with_command(tmp_path, "sleep 100", 0.3, timeout="fail"))
    assert (ours.status, ours.error_class) == ("failed", "VerifierError")
    assert (theirs.status, theirs.score) == ("graded", 0.0)


async def test_an_unknown_verifier_or_tool_chain_is_failed(tmp_path: Path) -> None:
    unknown = await grade(with_test(tmp_path, SCRIPT, name="harbour"))
    assert (unknown.status, unknown.error_class) == ("failed", "ConfigError")
    assert "did you mean 'harbor'" in unknown.evidence
    task = with_command(tmp_path, "true")
    mounts = {"/opt/x": "toolchain:fortran"}
    missing = msgspec.structs.replace(task, environment=msgspec.structs.replace(task.environment, mounts=mounts))
    assert (await grade(missing)).error_class == "TaskError"


async def test_what_is_not_gradable_gets_no_score(tmp_path: Path) -> None:
    reward = await grade(with_command(tmp_path, "true"), outcome="infra_error")
    assert (reward.status, reward.error_class) == ("failed", "VerifierError")


STUB = b"""diff --git a/add_two.py b/add_two.py
--- a/add_two.py
+++ b/add_two.py
@@ -1,2 +1,2 @@
 def add(a, b):
-    pass
+    return 4
"""
CHEATS = {
    "edits the tests": b"""diff --git a/add_two_test.py b/add_two_test.py
--- a/add_two_test.py
+++ b/add_two_test.py
@@ -1,5 +1 @@
-from add_two import add
-
-
 def test_add():
-    assert add(2, 3) == 5
+    pass
""",
    "deletes the tests": b"""diff --git a/add_two_test.py b/add_two_test.py
deleted file mode 100644
--- a/add_two_test.py
+++ /dev/null
@@ -1,5 +0,0 @@
-from add_two import add
-
-
-def test_add():
-    assert add(2, 3) == 5
""",
    "replaces the runner": b"""diff --git a/conftest.py b/conftest.py
new file mode 100644
--- /dev/null
+++ b/conftest.py
@@ -0,0 +1,3 @@
+import os
+
+os._exit(0)
""",
}


@pytest.mark.parametrize("cheat", CHEATS)
async def test_an_exercise_is_graded_on_its_solution_files_only(tmp_path: Path, cheat: str) -> None:
    exercise(tmp_path)
    task = open_dataset(f"polyglot:{tmp_path}").tasks()[0]
    reward = await grade(task, STUB + CHEATS[cheat])
    assert (reward.status, reward.score) == ("graded", 0.0)
    assert "assert 4 == 5" in reward.evidence
    assert (await grade(task, STUB.replace(b"4", b"a + b") + CHEATS[cheat])).score == 1.0


def fences(document: str, language: str) -> list[str]:
    """The code of a document in one language."""
    text = (Path(__file__).parents[2] / "docs" / document).read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


CASES = {
    "task.toml": "",
    "tests/test.sh": None,
    "tests/cases.json": '[[["Ann"], "hello Ann"], [["Bo"], "hello Bo"]]',
    "solution/solve.sh": "#!/bin/sh\necho 'import sys; print(\"hello\", sys.argv[1])' > main.py\n",
}


def install(site: Path, code: str, points: str) -> None:
    """As pip would: a module and its metadata in a directory of the path."""
    write(site / "my_package", {"__init__.py": "", "cases.py": code})
    about = {"METADATA": "Metadata-Version: 2.1\nName: cases\nVersion: 1.0\n", "entry_points.txt": points}
    write(site / "cases-1.0.dist-info", about)


def test_the_documents_own_verifier_grades_a_task_directory(tmp_path: Path) -> None:
    (code,), (points,) = fences("datasets.md", "python"), fences("datasets.md", "toml")
    install(tmp_path / "site", code, points.replace("project.entry-points.", "").replace('"', ""))
    harbor_task(tmp_path / "tasks", files=CASES)
    spec = f"harbor:{tmp_path / 'tasks'}?verifier=cases"
    command = [sys.executable, "-m", "kat_stream.cli", "datasets", "check", spec]
    path = os.pathsep.join([str(tmp_path / "site"), str(Path(__file__).parents[2])])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "1 of 1 tasks are sound\n"), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "code", "reason"),
    [
        ("garbled", "def (", "cannot be imported from my_package.cases:Cases: SyntaxError"),
        ("failing", "{}['a']", "cannot be imported from my_package.cases:Cases: KeyError: 'a'"),
        ("object", "class A:\n  pass\nCases = A()", "is no class that is called without arguments: 'A' object"),
        ("needy", "class Cases:\n  def __init__(self, key): ...", "without arguments: Cases.__init__"),
        ("bare", "class Cases:\n  async def grade(self, task, tests, sandbox): ...", "'bare' has no name, version"),
    ],
)
def test_a_plug_in_that_is_no_verifier_is_said_before_any_rollout(
    tmp_path: Path, name: str, code: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "site", code, f"[kat_stream.verifiers]\n{name} = my_package.cases:Cases\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    for module in ("my_package", "my_package.cases"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    harbor_task(tmp_path)
    with pytest.raises(ConfigError, match=re.escape(reason)):
        open_dataset(f"harbor:{tmp_path}?verifier={name}")


def test_a_verifier_that_is_not_installed_is_said_before_any_rollout(tmp_path: Path) -> None:
    harbor_task(tmp_path)
    with pytest.raises(ConfigError, match="no 'comand'; did you mean 'command'"):
        open_dataset(f"harbor:{tmp_path}?verifier=comand")


class Answering:
    """A plug-in with a mistake in it."""

    name, version = "answering", "1"

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    async def grade(self, task: Task, tests: Files, sandbox: Sandbox) -> Verdict:
        return self.answer  # type: ignore[no-any-return]


@pytest.mark.parametrize("answer", [None, 1.0, Verdict(math.nan), Verdict(1.0, {"a": "b"}), Verdict("1")])  # type: ignore[arg-type,dict-item]
async def test_what_is_no_verdict_is_the_verifiers_failure(
    tmp_path: Path, answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kat_stream.env.grading.get_verifier", lambda name: Answering(answer))
    reward = await grade(with_test(tmp_path, SCRIPT, name="answering"))
    assert (reward.status, reward.error_class) == ("failed", "VerifierError")
    assert "the verifier 'answering' answered " in reward.evidence
