"""Mend tasks: every oracle passes, doing nothing or doing it badly fails, and the two splits share no solution."""

from __future__ import annotations

import subprocess
import tomllib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kat_stream.env.mend import MendTask, generate, repository, write_task
from kat_stream.env.mend.harbor import write_files
from kat_stream.env.mend.templates import TEMPLATES
from kat_stream.errors import TaskError

HELD_OUT = generate("held-out", 400)


def run(commands: tuple[str, ...], tree: Path) -> None:
    for command in commands:
        subprocess.run(["sh", "-c", command], cwd=tree, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)


def passes(task: MendTask, tree: Path) -> bool:
    return subprocess.run(["sh", "-c", task.check], cwd=tree, capture_output=True, timeout=60).returncode == 0


def verdicts(task: MendTask, folder: Path) -> dict[str, bool]:
    """What the check says of the untouched tree, the oracle and some ways to cheat or to be careless."""
    ways: dict[str, tuple[str, ...]] = {
        "no-op": (),
        "looks only": ("cat test.sh", *task.solution[:-1]),
        "visible test replaced": ("echo exit 0 > test.sh",),
        "everything emptied": ("for f in $(find . -type f -not -path './.git/*'); do : > $f; done",),
        "oracle, then a line too many": (*task.solution, "for f in $(find . -type f); do echo x >> $f; done"),
        "oracle": task.solution,
    }
    seen = {}
    for number, (name, commands) in enumerate(ways.items()):
        tree = folder / f"{task.task_id}-{number}"
        write_files(tree, task.files)
        run(commands, tree)
        seen[name] = passes(task, tree)
    return seen


def test_oracle_passes_and_everything_else_fails_for_400_tasks(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda task: verdicts(task, tmp_path), HELD_OUT))
    for task, seen in zip(HELD_OUT, results, strict=True):
        assert [name for name, passed in seen.items() if passed] == ["oracle"], task


def test_splits_share_no_solution_and_are_large_enough() -> None:
    train = generate("train", 3000)
    held_out = generate("held-out", 480)
    assert len({task.task_id for task in train}) == 3000
    assert len({task.task_id for task in held_out}) == 480
    assert not {task.solution for task in train} & {task.solution for task in held_out}


def test_generation_is_seeded_and_balanced() -> None:
    assert generate("train", 30, seed=3) == generate("train", 30, seed=3)
    assert generate("train", 30, seed=3) != generate("train", 30, seed=4)
    counts = Counter(task.template for task in HELD_OUT)
    assert set(counts) == set(TEMPLATES) and max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("task", HELD_OUT[:15], ids=lambda task: task.template)
def test_visible_test_fails_before_and_passes_after(task: MendTask, tmp_path: Path) -> None:
    write_files(tmp_path, task.files)
    assert subprocess.run(["./test.sh"], cwd=tmp_path, capture_output=True, timeout=60).returncode == 1
    run(task.solution, tmp_path)
    assert subprocess.run(["./test.sh"], cwd=tmp_path, capture_output=True, timeout=60).returncode == 0


@pytest.mark.parametrize("task", HELD_OUT[:15], ids=lambda task: task.template)
def test_repository_is_what_git_expects(task: MendTask, tmp_path: Path) -> None:
    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
        return done.stdout

    write_files(tmp_path, repository(task))
    git("fsck", "--strict")
    git("add", "-A")
    assert git("diff", "--cached", "HEAD") == ""
    run(task.solution, tmp_path)
    git("add", "-A")
    patch = git("diff", "--cached", "HEAD", "--binary")
    assert patch.startswith("diff --git")

    clean = tmp_path.parent / f"{tmp_path.name}-clean"
    write_files(clean, task.files)
    subprocess.run(["git", "apply", "-"], cwd=clean, input=patch, text=True, check=True, timeout=60)
    assert passes(task, clean)


def test_task_directory_is_in_the_harbor_format(tmp_path: Path) -> None:
    task = HELD_OUT[0]
    write_task(task, tmp_path / "task")
    described = tomllib.loads((tmp_path / "task/task.toml").read_text())
    assert described["version"] == "1.0"
    assert described["verifier"]["timeout_sec"] > 0 and described["agent"]["timeout_sec"] > 0
    assert (tmp_path / "task/instruction.md").read_text().strip() == task.instruction
    assert "COPY repo /work" in (tmp_path / "task/environment/Dockerfile").read_text()
    for path, (content, mode) in task.files.items():
        written = tmp_path / "task/environment/repo" / path
        assert written.read_bytes() == content and written.stat().st_mode & 0o777 == mode
    for script in ("tests/test.sh", "solution/solve.sh"):
        assert subprocess.run(["sh", "-n", tmp_path / "task" / script], timeout=60).returncode == 0


def test_the_directorys_own_scripts_reward_the_solution_only(tmp_path: Path) -> None:
    for task in HELD_OUT[:15]:
        folder = tmp_path / task.task_id
        write_task(task, folder)
        # The scripts name /work and /logs; a sandbox would mount them, here they are rewritten.
        for script in ("tests/test.sh", "solution/solve.sh"):
            text = (folder / script).read_text().replace("/logs", str(folder / "logs"))
            (folder / script).write_text(text.replace("/work", str(folder / "environment/repo")))
        reward = folder / "logs/verifier/reward.txt"
        subprocess.run(["sh", folder / "tests/test.sh"], timeout=60, check=True)
        assert reward.read_text() == "0\n", task
        subprocess.run(["sh", folder / "solution/solve.sh"], timeout=60, check=True, capture_output=True)
        subprocess.run(["sh", folder / "tests/test.sh"], timeout=60, check=True)
        assert reward.read_text() == "1\n", task


def test_asking_for_more_tasks_than_there_are_is_an_error() -> None:
    with pytest.raises(TaskError, match="ask for fewer"):
        generate("held-out", 15 * 2000)
