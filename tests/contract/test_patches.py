"""The patch: exactly what the agent changed in the task's files, whatever git makes of either's repository."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kat_stream.env.trajectories import PATCH_LIMIT
from tests.contract.env_kit import TEST_SH, done_and_graded, exercise, first_task, harbor_task, needs_bwrap, write

pytestmark = [pytest.mark.anyio, needs_bwrap]

FIX = "echo fixed > state.txt"
COMMIT = "git add -A && git -c user.name=a -c user.email=a@b commit -qm m"
REPOSITORY = f"git init -q . && {COMMIT}"
WINDOWS = b"a\r\nb\r\n"
UTF16 = "a\nb\n".encode("utf-16le")
EDIT = "sed -i s/b/B/ w.txt"
IGNORE_ALL = "mkdir -p ~/.config/git /tmp/.config/git; echo '*' | tee ~/.config/git/ignore > /tmp/.config/git/ignore"


@dataclass(frozen=True)
class Case:
    """What the agent does beside the task proper, and what of it the tests must find."""

    does: str
    holds: str
    files: dict[str, bytes] = field(default_factory=dict)
    """Of the task, beside state.txt."""
    before: str = "true"
    """What its author did in its directory."""


ORDINARY = {
    "text=auto": Case(EDIT, "grep B w.txt", {".gitattributes": b"* text=auto\n", "w.txt": WINDOWS}),
    "eol=crlf": Case(EDIT, "grep B w.txt", {".gitattributes": b"*.txt text eol=crlf\n", "w.txt": WINDOWS}),
    "windows": Case(EDIT, "grep B w.txt", {"w.txt": WINDOWS}),
    "encoding": Case(
        EDIT, "grep B w.txt", {".gitattributes": b"w.txt text working-tree-encoding=UTF-16LE\n", "w.txt": UTF16}
    ),
    "ident": Case(EDIT, "grep B w.txt", {".gitattributes": b"*.txt ident\n", "w.txt": b"$Id: a $\nb\n"}),
    "untracked": Case("true", "test -e new.txt", before=f"{REPOSITORY} && echo new > new.txt"),
    "modified": Case(EDIT, "grep B w.txt", {"w.txt": b"a\n"}, f"{REPOSITORY} && echo b > w.txt"),
    "packed refs": Case("git log --format=%s > log", "grep -x m log", before=f"{REPOSITORY} && git pack-refs --all"),
    "nested": Case("echo B > p/a", "grep B p/a", {"p/a": b"a\n"}, f"cd p && {REPOSITORY}"),
    "nested without a commit": Case("echo B > p/a", "grep B p/a", {"p/a": b"a\n"}, "git init -q p"),
    "nested by the agent": Case(f"mkdir r && cd r && echo B > a && {REPOSITORY}", "grep B r/a"),
    "nested by the agent without a commit": Case("git init -q r && echo B > r/a", "grep B r/a"),
    "diff.noprefix": Case("git config diff.noprefix true && HOME=/tmp git config --global diff.noprefix true", "true"),
    "core.fileMode": Case("git config core.fileMode false && chmod +x state.txt", "test -x state.txt"),
    "ignored everywhere": Case(f"{IGNORE_ALL}; echo B > new.txt", "grep B new.txt"),
    "an ignored file of the task": Case("echo B > a.o", "grep B a.o", {".gitignore": b"*.o\n", "a.o": b"a\n"}),
    "a file for a directory": Case("rm -r d && echo B > d", "grep B d", {"d/1": b"1\n"}),
    "a directory for a file": Case("rm f && mkdir f && echo B > f/x", "grep B f/x", {"f": b"f\n"}),
    "a link for a file": Case("ln -sf state.txt f", "test -L f", {"f": b"f\n"}),
    "an empty file": Case("touch empty", "test -e empty"),
    "the same size and time": Case("printf B > w.txt && touch -r state.txt w.txt", "grep B w.txt", {"w.txt": b"a"}),
    "a list of ignored files that nobody may read": Case("chmod 0 .git/info/exclude && echo B > b", "grep B b"),
    "binary": Case("printf '\\0\\377' > b", "test $(wc -c < b) = 2", {"b": b"\0\1\2"}),
    "odd names": Case(
        'for f in *; do echo B >> "$f"; done', "test $(cat * | grep -c B) = 3", {'q"\\ \n': b"", "[x]*": b""}
    ),
}


@pytest.mark.parametrize("case", ORDINARY)
async def test_right_work_gets_its_1_whatever_git_makes_of_its_repository(tmp_path: Path, case: str) -> None:
    what = ORDINARY[case]
    test = TEST_SH.replace("grep -qx fixed", f"({what.holds}) >/dev/null && grep -q fixed")
    work_tree = harbor_task(tmp_path, files={"tests/test.sh": test}) / "environment" / "repo"
    _prepare(work_tree, what)
    trajectory, reward = await done_and_graded(first_task(f"harbor:{tmp_path}"), f"{FIX} && ({what.does})")
    assert trajectory.outcome == "submitted", trajectory.detail
    assert (reward.status, reward.score) == ("graded", 1.0), reward.evidence


def _prepare(work_tree: Path, case: Case) -> None:
    for name, content in case.files.items():
        (work_tree / name).parent.mkdir(exist_ok=True)
        (work_tree / name).write_bytes(content)
    subprocess.run(case.before, shell=True, cwd=work_tree, check=True)


async def test_what_gitignore_keeps_out_of_the_agents_files_is_not_in_the_patch(tmp_path: Path) -> None:
    write(harbor_task(tmp_path) / "environment" / "repo", {".gitignore": "*.log\nbuild/\n"})
    tasks = f"mkdir -p build/dep && echo x > a.log && (cd build/dep && echo x > x && {REPOSITORY})"
    agents = "mkdir target && echo '*' > target/.gitignore; echo notes >> .git/info/exclude; touch target/x notes"
    trajectory, reward = await done_and_graded(first_task(f"harbor:{tmp_path}"), f"{tasks} && {agents}; {FIX}")
    assert (trajectory.outcome, reward.score) == ("submitted", 1.0), trajectory.detail
    assert trajectory.patch.count(b"diff --git") == 1


async def test_the_patch_needs_no_room_where_the_agent_works(tmp_path: Path) -> None:
    harbor_task(tmp_path)
    fill = "echo big >> .git/info/exclude; cat /dev/zero > big; cat /dev/zero > /tmp/big; true"
    trajectory, reward = await done_and_graded(first_task(f"harbor:{tmp_path}"), f"{FIX}; {fill}")
    assert (trajectory.outcome, reward.score) == ("submitted", 1.0), trajectory.detail


async def test_a_product_beside_the_files_that_are_graded_costs_nothing(tmp_path: Path) -> None:
    exercise(tmp_path)
    task = first_task(f"polyglot:{tmp_path}")
    solve = "printf 'def add(a, b):\\n    return a + b\\n' > add_two.py"
    trajectory, reward = await done_and_graded(task, f"{solve} && head -c {2 * PATCH_LIMIT} /dev/urandom > product")
    assert (trajectory.outcome, reward.score) == ("submitted", 1.0), trajectory.detail
    assert trajectory.patch.count(b"diff --git") == 1
