"""The trajectory manager: a task's work tree goes into a sandbox and comes out as a patch.

Owns the patch, and the repository that a task without one gets to work in. Invariants: the patch is the difference to
the task's own files, byte for byte, whatever the task's or the agent's repositories, git configuration and attributes
say (commits, `rm -rf .git`, nested repositories, line endings). In it is what the task ships, whatever is ignored; of
what the agent made all that no .gitignore or .git/info/exclude of the work tree keeps out, and of what one does each
file and directory of at most IGNORED_LIMIT bytes (a build's product may be what was asked for), as long as the patch
has room for all of them and but for caches, which are made again; nothing of a .git, and nothing that is no file or
link. What of that was left out is said. No file of the sandbox is read by the host.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from kat_stream.env.datasets import Files
from kat_stream.env.datasets.toolchains import resolve
from kat_stream.env.gitfiles import git_files
from kat_stream.env.sandboxes.base import ENVIRONMENT, ExecResult, Mount, Sandbox, SandboxSpec
from kat_stream.env.sandboxes.files import pack
from kat_stream.errors import DataError, SandboxError
from topics import Task

PATCH_LIMIT = 512 << 10
"""Bytes. A larger patch would not fit into a record; it is the agent's error (a build product, a generated file)."""
IGNORED_LIMIT = 256 << 10
"""Bytes of one ignored file or directory that goes into a patch."""
# Zeros are packed a thousandfold: a patch has no room for a larger file, whatever is in it.
_LARGEST_KB = 400 << 10
# What is told beside the patch, before it.
_TOLD_LIMIT = 16 << 10
# A file system of its own, so that a full work tree or /tmp leaves room to take the patch.
_REPOSITORIES = "/var/lib/kat-stream"
TESTS_OWN = ("/logs", "/tests")
"""Where tests find themselves and leave their result; nothing of an agent's is there when they begin."""
WRITABLE = (*TESTS_OWN, "/solution", _REPOSITORIES)
_GIT_TIMEOUT_S = 60.0
_IDENTITY = {"NAME": "kat-stream", "EMAIL": "env@kat-stream.invalid", "DATE": "1700000000 +0000"}
_ENVIRONMENT = {
    **{f"GIT_{role}_{key}": value for role in ("AUTHOR", "COMMITTER") for key, value in _IDENTITY.items()},
    # No configuration, attribute or list of ignored files but the repository's own.
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_COUNT": "0",
    "GIT_ATTR_NOSYSTEM": "1",
    "XDG_CONFIG_HOME": "/nonexistent",
    "HOME": "/nonexistent",
    # The task's own may lead anywhere.
    "PATH": ENVIRONMENT["PATH"],
}
# Git adds a repository within the work tree as a link to its commit, or not at all; one of whose directory the index
# holds a file already it walks through like any other. This file is in no work tree, so no commit and no diff has it.
_AS_FILES = (
    r"sed -z 's|^\./\(.*\)/\.git$|100644 e69de29bb2d1d6434b8b29ae775ad8c2e48c5391\t\1/.git-|'"
    " | git update-index -z --index-info"
)
_FIND_NESTED = "find . -mindepth 2 -name .git -prune"
# Git knows a repository by these directories, which may be empty; then they did not come with the files.
_KNOWN_BY = (".git/objects/", ".git/refs/")
# A repository that was just made needs no upkeep, for which git would start another process.
_NEW_REPOSITORY = f"""set -e
git init -q -b main .
if [ -n "$({_FIND_NESTED} -print -quit)" ]; then {_FIND_NESTED} -print0 | {_AS_FILES}; fi
git add -A -f .
git -c maintenance.auto=false -c gc.auto=0 commit -q --allow-empty -m 'The state to work on'
"""
# All that makes a repository. info/attributes goes before every .gitattributes: bytes stay what they are.
_OPEN = """set -e
mkdir -p "$GIT_DIR/info" "$GIT_DIR/objects" "$GIT_DIR/refs"
echo 'ref: refs/heads/none' >"$GIT_DIR/HEAD"
echo '* -text -ident -filter !working-tree-encoding !diff' >"$GIT_DIR/info/attributes"
"""
_WALK = 'find . -path ./.git -prune -o -name .git -prune -fprint0 "$GIT_DIR/nested"'
# What an agent made unreadable for itself is made readable, what is no file goes: git would wait for ever for the other
# end of a FIFO, and of files of holes it fills the disk as it reads them. Not where its final state is graded.
_READY = rf"""[ -r . -a -w . -a -x . ] || chmod u+rwx "$WORK"
{_WALK} -o -type d ! -perm -700 -exec chmod u+rwx {{}} \; \
    -o -type f -size +"$LARGEST_KB"k -fprintf "$GIT_DIR/giants" '%s\t%P\0' -exec rm -f {{}} + \
    -o -type f ! -perm -400 -exec chmod u+r {{}} + \
    -o ! -type f ! -type d ! -type l -exec rm -f {{}} + -fprint0 "$GIT_DIR/gone"
if [ -s "$GIT_DIR/gone" ]; then
    printf '%s that are neither files nor links\0' $(tr -dc '\0' <"$GIT_DIR/gone" | wc -c)
fi
head -c {_TOLD_LIMIT // 4} "$GIT_DIR/giants"
"""
_NESTED = f'if [ -s "$GIT_DIR/nested" ]; then cat "$GIT_DIR/nested" | {_AS_FILES}; fi'
# These no .gitignore needs to name for everybody to know that they are made again.
_CACHES = r"(^|/)(__pycache__|node_modules|\.?venv|\.tox|\.[^/]*cache[^/]*)/|\.py[co]$"
_DU = 'du -0sb --files0-from="$GIT_DIR/products"'
_ADD_IGNORED = f"""git "$@" ls-files -z -o -i --exclude-standard --directory >"$GIT_DIR/ignored"
if [ -s "$GIT_DIR/ignored" ] && grep -zvE '{_CACHES}' "$GIT_DIR/ignored" >"$GIT_DIR/products"; then
    {_DU} -t -{IGNORED_LIMIT} | cut -z -f 2- >"$GIT_DIR/small"
    {_NESTED}
    git add -N -f --pathspec-from-file="$GIT_DIR/small" --pathspec-file-nul
    {_DU} -t {IGNORED_LIMIT + 1} | head -c {_TOLD_LIMIT // 2}
fi
"""
# With -N a new file is only named: the content of what may be a large build product is read where it is, once. An index
# that is locked git diff cannot bring up to date, for which it would read every file again.
_TAKE = f"""{_OPEN}
tar -x --no-same-owner -f - -C "$GIT_DIR"
{{walk}}
{_NESTED}
if [ -f .git/info/exclude ]; then set -- -c core.excludesFile=.git/info/exclude; fi
git "$@" add -N .
{{ignored}}
printf '\\0\\0'
: >"$GIT_DIR/index.lock"
exec git diff --binary --no-color --no-ext-diff --no-textconv --no-renames """
# What --include takes for a pattern.
_GLOB = re.compile(r"[*?\[\\]")
_APPLY = f"{_OPEN}exec git apply --whitespace=nowarn "


class PatchTooLarge(DataError):
    """The work tree differs from the task's files by more than PATCH_LIMIT bytes."""


def sandbox_spec(
    task: Task,
    *,
    wall_s: float,
    network: Literal["none", "gateway"] = "none",
    mounts: Mapping[str, str] | None = None,
    memory_mb: int = 0,
    pids: int = 0,
    disk_mb: int = 0,
    writable: tuple[str, ...] = (),
) -> SandboxSpec:
    """The sandbox of a task. `mounts` (path inside -> path on the worker) and what follows are the agent's own needs.

    They come on top of the task's; TaskError if the task needs a tool chain that is not on this worker.
    """
    environment = task.environment
    shown = {**resolve(environment.mounts), **(mounts or {})}
    return SandboxSpec(
        workdir=environment.workdir,
        env=environment.env,
        memory_mb=environment.memory_mb + memory_mb,
        pids=environment.pids + pids,
        cpus=environment.cpus,
        disk_mb=environment.disk_mb + disk_mb,
        wall_s=wall_s,
        network=network,
        mounts=tuple(Mount(source, inside) for inside, source in shown.items()),
        writable=(*WRITABLE, *writable),
    )


async def lay_out(sandbox: Sandbox, task: Task, files: Files) -> None:
    """Put the work tree into the sandbox; one that comes without a repository gets one, for the agent to use."""
    await sandbox.put(files, task.environment.workdir)
    script = _NEW_REPOSITORY if ".git/HEAD" not in files else _missing(files)
    if not script:
        return
    done = await sandbox.exec(script, timeout_s=_GIT_TIMEOUT_S, env=_ENVIRONMENT)
    if done.exit_code != 0:
        raise SandboxError(f"{task.task_id}: no repository to work in: {_said(done)}")


@dataclass(frozen=True)
class Patch:
    """A binary git diff, empty if nothing was changed, and what of the agent's work is not in it, for people."""

    content: bytes
    left_out: str = ""


async def take_patch(sandbox: Sandbox, task: Task, files: Files) -> Patch:
    """What the agent changed in the task's files. Where only some files are graded, what it did to those.

    PatchTooLarge above PATCH_LIMIT; DataError if the work tree cannot be read; SandboxDied if the sandbox is gone.
    """
    tree, parts = await asyncio.to_thread(_packed, files)
    graded = _graded(task)
    walk = _WALK if task.verifier.in_place else _READY
    # What the task ships is no larger than its sandbox, and not the agent's.
    shipped_kb = max((-(-len(content) // 1024) for content, _ in files.values()), default=0)

    async def take(ignored: str) -> Patch:
        done = await sandbox.exec(
            _TAKE.format(walk=walk, ignored=ignored) + shlex.join((tree, "--", *graded)),
            timeout_s=_GIT_TIMEOUT_S,
            stdin=parts,
            env={
                **_repository(sandbox),
                "GIT_LITERAL_PATHSPECS": "1",
                "WORK": sandbox.root + task.environment.workdir,
                "LARGEST_KB": str(max(shipped_kb, min((sandbox.spec.disk_mb << 10) // 2, _LARGEST_KB))),
            },
            output_limit=_TOLD_LIMIT + PATCH_LIMIT,
        )
        return _patch(done)

    if graded:
        return await take("")
    try:
        return await take(_ADD_IGNORED)
    except PatchTooLarge:
        rest = await take("")
        return Patch(rest.content, ", ".join(filter(None, ("all that is ignored, for lack of room", rest.left_out))))


async def apply_patch(sandbox: Sandbox, task: Task, patch: bytes) -> str:
    """Apply an agent's patch to the pristine work tree; returns why it does not apply, empty if it does."""
    if not patch:
        return ""
    command = _APPLY + shlex.join([f"--include={_GLOB.sub(r'\\\g<0>', path)}" for path in _graded(task)] + ["-"])
    done = await sandbox.exec(command, timeout_s=_GIT_TIMEOUT_S, stdin=patch, env=_repository(sandbox))
    return "" if done.exit_code == 0 else f"the patch does not apply: {_said(done)}"


def _packed(files: Files) -> tuple[str, bytes]:
    """(The tree's id, the repository's parts as a tar archive.)"""
    tree, made = git_files(files)
    return tree, pack(made)


def _patch(done: ExecResult) -> Patch:
    if done.exit_code != 0:
        raise DataError(f"the work tree cannot be read: {_said(done)}")
    told, _, content = done.stdout.partition(b"\0\0")
    content = content.lstrip(b"\0")
    if done.truncated or len(content) > PATCH_LIMIT:
        raise PatchTooLarge(f"the patch is larger than {PATCH_LIMIT} bytes")
    return Patch(content, ", ".join(_named(item) for item in told.decode(errors="replace").split("\0") if item))


def _named(item: str) -> str:
    """`size<TAB>name` as du writes it, or what is said already."""
    size, _, name = item.partition("\t")
    return f"{name} ({size} bytes)" if name else item


def _missing(files: Files) -> str:
    """What completes the task's own repository; empty if it is complete."""
    missing = [place for place in _KNOWN_BY if not any(path.startswith(place) for path in files)]
    return shlex.join(["mkdir", "-p", *missing]) if missing else ""


def _graded(task: Task) -> list[str]:
    """The only files that are graded; empty: all are."""
    return task.verifier.options.get("include", "").splitlines()


def _repository(sandbox: Sandbox) -> dict[str, str]:
    """Git's environment for a new repository of ours beside the work tree, under a name that the agent cannot know."""
    place = f"{sandbox.root}{_REPOSITORIES}/{secrets.token_hex(8)}"
    return {**_ENVIRONMENT, "GIT_DIR": place, "GIT_WORK_TREE": "."}


def _said(done: ExecResult) -> str:
    output = done.stderr.decode("utf-8", errors="replace").strip()
    return f"{output[-500:]} [exit {done.exit_code}{', timed out' if done.timed_out else ''}]"
