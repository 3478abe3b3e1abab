"""The patch: exactly what the agent changed in the task's files, whatever git makes of either's repository."""

from __future__ import annotations

import shlex
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kat_stream.env.trajectories import IGNORED_LIMIT, PATCH_LIMIT
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
    "a file that nobody may read": Case(
        "chmod 0 w.txt; echo B >d; chmod 0 d", "grep B d && grep w w.txt", {"w.txt": b"w"}
    ),
    "a directory that nobody may enter": Case("mkdir -p d/e && echo B > d/e/f && chmod 0 d/e d", "grep B d/e/f"),
    "a work tree that nobody may enter": Case("echo B > d && chmod 0 .", "grep B d"),
    "links that lead nowhere": Case("ln -s b a; ln -s a b; ln -s . c; ln -s /etc/shadow d", "test -L a -a -L d"),
    "a deep tree": Case(
        "python3 -c \"import os; [(os.mkdir('d'), os.chdir('d')) for _ in range(2500)]\"; echo B > d/f", "grep B d/f"
    ),
    "a process that goes on": Case(
        "(setsid sh -c 'while :; do echo > t; mv t u; touch went; rm u; done' >/dev/null 2>&1 &);"
        "until [ -e went ]; do sleep 0.01; done",
        "test -e went",
    ),
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


CACHES = ("__pycache__/a.pyc", "node_modules/a/a.js", ".venv/a", ".pytest_cache/a", "b.pyc")


async def test_of_what_is_ignored_small_products_are_in_the_patch_and_neither_caches_nor_large_ones(
    tmp_path: Path,
) -> None:
    ignored = "dist/\npage\nbuild/\nnode_modules\n__pycache__/\n.venv\n.pytest_cache\n*.pyc\n"
    test = "#!/bin/sh\nfind . -type f | sort | xargs cat; echo 1 > /logs/verifier/reward.txt\n"
    repo = harbor_task(tmp_path, files={"tests/test.sh": test}) / "environment" / "repo"
    write(repo, {".gitignore": ignored, "state.txt": ""})
    caches = "; ".join(f"mkdir -p $(dirname {path}) && echo cache > {path}" for path in CACHES)
    large = f"mkdir build && head -c {IGNORED_LIMIT} /dev/zero > build/x && echo B > build/y"
    small = "echo notes >> .git/info/exclude; mkdir -p dist/in; echo 1 > dist/in/x; echo 2 > page; echo 3 > notes"
    nested = "cd dist && git init -q . && cd .."
    trajectory, reward = await done_and_graded(
        first_task(f"harbor:{tmp_path}"), f"{caches}; {large}; {small}; {nested}"
    )
    assert reward.evidence == f"{ignored}1\n3\n2\n"
    assert "left out of the patch: build/ (2" in trajectory.detail
    assert trajectory.patch.count(b"diff --git") == 3


async def test_what_is_ignored_takes_no_room_from_the_rest_of_the_patch(tmp_path: Path) -> None:
    write(harbor_task(tmp_path) / "environment" / "repo", {".gitignore": "*.o\n"})
    random = "head -c {} /dev/urandom"
    makes = f"for i in 1 2 3 4; do {random.format(IGNORED_LIMIT // 2)} > $i.o; done; {random.format(300_000)} > new"
    trajectory, reward = await done_and_graded(first_task(f"harbor:{tmp_path}"), f"{FIX}; {makes}")
    assert (trajectory.outcome, reward.score) == ("submitted", 1.0), trajectory.detail
    assert trajectory.patch.count(b"diff --git") == 2
    assert "all that is ignored" in trajectory.detail


FIFO = "rm -f {0}; mkfifo {0}"
SPECIAL = {
    "a FIFO": (FIFO.format("f"), "! test -e f"),
    "a FIFO for a file of the task": (FIFO.format("w.txt"), "! test -e w.txt"),
    "a FIFO that git would read": (FIFO.format(".gitignore"), "! test -e .gitignore"),
    "a socket": ("python3 -c \"import socket; socket.socket(1).bind('s')\"", "! test -e s"),
}


@pytest.mark.parametrize("case", SPECIAL)
async def test_what_is_no_file_is_counted_and_ends_nothing(tmp_path: Path, case: str) -> None:
    does, holds = SPECIAL[case]
    test = TEST_SH.replace("grep -qx fixed", f"{holds} && grep -qx fixed")
    write(harbor_task(tmp_path, files={"tests/test.sh": test}) / "environment" / "repo", {"w.txt": "w\n"})
    trajectory, reward = await done_and_graded(first_task(f"harbor:{tmp_path}"), f"{FIX}; {does}")
    assert (trajectory.outcome, reward.score) == ("submitted", 1.0), trajectory.detail
    assert trajectory.detail == "left out of the patch: 1 that are neither files nor links"


async def test_files_of_holes_that_nobody_can_read_are_left_out_by_name(tmp_path: Path) -> None:
    """To read them fills the disk, of which they have the size each. What the task ships itself is no such file."""
    test = TEST_SH.replace("grep -qx fixed", "! test -e a && ! test -e w.txt && test -e own && grep -qx fixed")
    repo = harbor_task(tmp_path, files={"tests/test.sh": test}) / "environment" / "repo"
    write(repo, {"w.txt": "w\n", "own": "own" * (3 << 20)})
    does = f"{FIX}; truncate -s 16M a; truncate -s 16M w.txt"
    trajectory, reward = await done_and_graded(first_task(f"harbor:{tmp_path}"), does)
    assert (trajectory.outcome, reward.score) == ("submitted", 1.0), trajectory.detail
    named = trajectory.detail.removeprefix("left out of the patch: ").split(", ")
    assert sorted(named) == ["a (16777216 bytes)", "w.txt (16777216 bytes)"]


@pytest.mark.parametrize("verifier", ["", "[verifier]\nin_place = true\n"])
async def test_a_path_that_leads_nowhere_is_the_agents_and_the_tests_alone(tmp_path: Path, verifier: str) -> None:
    test = '#!/bin/sh\nread line < state.txt; echo "$PATH"; [ $line = fixed ] && echo 1 > /logs/verifier/reward.txt\n'
    dockerfile = "FROM a\nENV PATH=/nowhere\nWORKDIR /app\nCOPY repo/ /app/\n"
    harbor_task(tmp_path, files={"task.toml": verifier, "tests/test.sh": test, "environment/Dockerfile": dockerfile})
    task = first_task(f"harbor:{tmp_path}")
    trajectory, reward = await done_and_graded(task, f'[ "$PATH" = /nowhere ] && {FIX}')
    assert (trajectory.outcome, reward.score, reward.evidence) == ("submitted", 1.0, "/nowhere\n"), trajectory.detail


async def test_the_patch_needs_no_room_where_the_agent_works(tmp_path: Path) -> None:
    harbor_task(tmp_path)
    fill = "echo big >> .git/info/exclude; cat /dev/zero > big; cat /dev/zero > /tmp/big; true"
    trajectory, reward = await done_and_graded(first_task(f"harbor:{tmp_path}"), f"{FIX}; {fill}")
    assert (trajectory.outcome, reward.score) == ("submitted", 1.0), trajectory.detail


async def test_a_file_that_is_graded_may_be_called_like_a_pattern(tmp_path: Path) -> None:
    name = "add[1]*?\\.py"
    path = exercise(tmp_path, solution=[name])
    write(path, {name: "stub\n", "add_two_test.py": f"def test_add():\n    assert open({name!r}).read() == 'B\\n'\n"})
    _, reward = await done_and_graded(first_task(f"polyglot:{tmp_path}"), f"echo B > {shlex.quote(name)}")
    assert reward.score == 1.0, reward.evidence


async def test_a_product_beside_the_files_that_are_graded_costs_nothing(tmp_path: Path) -> None:
    exercise(tmp_path)
    task = first_task(f"polyglot:{tmp_path}")
    solve = "printf 'def add(a, b):\\n    return a + b\\n' > add_two.py"
    trajectory, reward = await done_and_graded(task, f"{solve} && head -c {2 * PATCH_LIMIT} /dev/urandom > product")
    assert (trajectory.outcome, reward.score) == ("submitted", 1.0), trajectory.detail
    assert trajectory.patch.count(b"diff --git") == 1
