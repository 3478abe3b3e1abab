"""Files as git keeps them: git itself finds the same tree in them, and nothing wrong with the objects."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from kat_stream.env.datasets import Files
from kat_stream.env.gitfiles import git_files

SIZES = (0, 1, 15, 16, 2047, 2048, 300_000)
TREES: dict[str, Files] = {
    "none": {},
    "sizes": {f"{size}": (bytes(range(256)) * (size // 256) + b"x" * (size % 256), 0o644) for size in SIZES},
    "order": dict.fromkeys(("a/b", "a.b", "a-b", "a0", "b/c/d", "b/c-", "B", "\u00e9/\u4e2d", "./b//e"), (b"", 0o644)),
    "names": dict.fromkeys(("\udcff", 'q"\\ \n', "d" * 200 + "/" + "e" * 200, ".gitignore", "-n"), (b"x", 0o644)),
    "the same twice": {"a": (b"x", 0o644), "b": (b"x", 0o755), "c/a": (b"x", 0o600), "d/a": (b"x", 0o711)},
    "line endings": {".gitattributes": (b"* text=auto\n*.t ident\n", 0o644), "a.t": (b"$Id$\r\n", 0o644)},
    "many": {f"{n % 7}/{n % 11}/{n}": (b"%d" % n, 0o644) for n in range(1000)},
}


@pytest.mark.parametrize("tree", TREES)
def test_git_finds_in_them_what_it_makes_of_the_files_itself(tmp_path: Path, tree: str) -> None:
    files = TREES[tree]
    write(tmp_path / "work", files)
    made, ours = repository(tmp_path, "git"), repository(tmp_path, "ours")
    made("add", "-A", "-f", ".")
    name, parts = git_files({**files, ".git/config": (b"nonsense", 0o644), "x/.git/HEAD": (b"ref", 0o644)})
    write(tmp_path / "ours", parts)
    assert name == made("write-tree")
    assert ours("ls-files", "-s", "-z") == made("ls-files", "-s", "-z")
    assert ours("ls-tree", "-r", "-z", name) == made("ls-tree", "-r", "-z", name)
    assert ours("diff", name) == ""
    ours("fsck", "--strict", name)
    ours("index-pack", "--strict", str(tmp_path / "ours/objects/pack/pack-files.pack"), "-o", str(tmp_path / "idx"))
    assert (tmp_path / "idx").read_bytes() == parts["objects/pack/pack-files.idx"][0]


def write(root: Path, files: Files) -> None:
    root.mkdir(exist_ok=True)
    for path, (content, mode) in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
        (root / path).chmod(mode)


def repository(root: Path, name: str) -> Callable[..., str]:
    """Git on a new repository beside the work tree, in which bytes stay what they are."""
    env = {**os.environ, "GIT_DIR": str(root / name), "GIT_WORK_TREE": str(root / "work"), "GIT_CONFIG_NOSYSTEM": "1"}

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], env=env, cwd=root / "work", check=True, capture_output=True)
        return os.fsdecode(done.stdout).strip()

    git("init", "-q")
    (root / name / "info").mkdir(exist_ok=True)
    (root / name / "info" / "attributes").write_text("* -text -ident\n")
    return git
