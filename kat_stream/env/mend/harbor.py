"""A mend task as a git repository and as a Harbor / Terminal-Bench 2 task directory.

Owns the two forms a task takes on disk. Invariant: the repository holds nothing of the check or the solution, and its
one commit is byte-identical for the same task (fixed author and date), so its id can be compared between machines.
"""

from __future__ import annotations

import zlib
from pathlib import Path

from kat_stream.env.gitfiles import head, objects_of, store
from kat_stream.env.mend.generator import MendTask

_AUTHOR = "kat-stream <demo@kat-stream.invalid> 1700000000 +0000"
_CONFIG = b"[core]\n\trepositoryformatversion = 0\n\tfilemode = true\n\tbare = false\n"
_OBJECT_MODE = 0o444
_FILE_MODE = 0o644

_TASK_TOML = """version = "1.0"

[metadata]
author_name = "kat-stream"
difficulty = "easy"
category = "software-engineering"
tags = ["mend", "{template}", "{split}"]

[verifier]
timeout_sec = 30.0

[agent]
timeout_sec = 60.0

[environment]
build_timeout_sec = 60.0
cpus = 1
memory = "256M"
storage = "64M"
"""

_DOCKERFILE = "FROM debian:bookworm-slim\nCOPY repo /work\nWORKDIR /work\n"

_TEST = """#!/bin/sh
# Grades the work tree in /work: 1 when it is mended and nothing else changed, else 0.
mkdir -p /logs/verifier
cd /work || exit 1
mended() {{
{check}}}
if mended; then echo 1; else echo 0; fi > /logs/verifier/reward.txt
"""


def repository(task: MendTask) -> dict[str, tuple[bytes, int]]:
    """The task's files and a `.git` whose HEAD commits them: path -> (content, mode). It has no index."""
    tree, objects = objects_of(task.files)
    message = f"tree {tree.hex()}\nauthor {_AUTHOR}\ncommitter {_AUTHOR}\n\nThe state to mend\n"
    commit = store(objects, b"commit", message.encode())
    return {
        **task.files,
        ".git/HEAD": (b"ref: refs/heads/main\n", _FILE_MODE),
        ".git/config": (_CONFIG, _FILE_MODE),
        ".git/refs/heads/main": (f"{commit.hex()}\n".encode(), _FILE_MODE),
        **{_loose(name.hex()): (zlib.compress(head(*one) + one[1], 1), _OBJECT_MODE) for name, one in objects.items()},
    }


def _loose(name: str) -> str:
    return f".git/objects/{name[:2]}/{name[2:]}"


def write_task(task: MendTask, directory: Path) -> None:
    """Write the task directory: task.toml, instruction.md, environment/, tests/test.sh, solution/solve.sh."""
    solve = "#!/bin/sh\nset -e\ncd /work\n" + "".join(f"{_may_fail(command)}\n" for command in task.solution)
    # Not indented: quoted file contents may span lines.
    test = _TEST.format(check=task.check)
    write_files(directory / "environment" / "repo", repository(task))
    write_files(
        directory,
        {
            "task.toml": (_TASK_TOML.format(template=task.template, split=task.split).encode(), _FILE_MODE),
            "instruction.md": (f"{task.instruction}\n".encode(), _FILE_MODE),
            "environment/Dockerfile": (_DOCKERFILE.encode(), _FILE_MODE),
            "tests/test.sh": (test.encode(), 0o755),
            "solution/solve.sh": (solve.encode(), 0o755),
        },
    )


def write_files(directory: Path, files: dict[str, tuple[bytes, int]]) -> None:
    """Write path -> (content, mode) below `directory`, which may not yet exist."""
    for path, (content, mode) in files.items():
        target = directory / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        target.chmod(mode)


def _may_fail(command: str) -> str:
    # The visible test is run to be read: before the repair it exits 1.
    return f"{command} || true" if command == "sh test.sh" else command
