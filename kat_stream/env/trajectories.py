"""The trajectory manager: a task's work tree goes into a sandbox and comes out as a patch.

Owns the git baseline and the patch. Invariant: the patch is the difference to the task's own files, whatever the agent
did to the repository in between (commits, `rm -rf .git`, a broken configuration), and no file of the sandbox is read
by the host.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Literal

from kat_stream.env.datasets import Files
from kat_stream.env.datasets.toolchains import resolve
from kat_stream.env.sandboxes.base import ExecResult, Mount, Sandbox, SandboxSpec
from kat_stream.errors import DataError, SandboxError
from topics import Task

PATCH_LIMIT = 512 << 10
"""Bytes. A larger patch would not fit into a record; it is the agent's error (a build product, a generated file)."""
WRITABLE = ("/logs", "/tests", "/solution")
_IDENTITY = {
    "GIT_AUTHOR_NAME": "kat-stream",
    "GIT_AUTHOR_EMAIL": "env@kat-stream.invalid",
    "GIT_AUTHOR_DATE": "1700000000 +0000",
    "GIT_COMMITTER_NAME": "kat-stream",
    "GIT_COMMITTER_EMAIL": "env@kat-stream.invalid",
    "GIT_COMMITTER_DATE": "1700000000 +0000",
    "GIT_CONFIG_NOSYSTEM": "1",
    "HOME": "/tmp",
}
_GIT_TIMEOUT_S = 60.0
_BASELINE = (
    "git init -q -b main . && git add -A -f . && git commit -q --allow-empty -m 'The state to work on'"
    " && git rev-parse HEAD"
)
_DIFF = "add -A . && git {where} diff --cached --binary --no-color --no-ext-diff --no-textconv --no-renames {base}"
_RESCUE = "/tmp/.kat-baseline"
_COMMIT = re.compile(rb"[0-9a-f]{40}(?:[0-9a-f]{24})?")


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
) -> SandboxSpec:
    """The sandbox of a task. `mounts` (path inside -> path on the worker) and limits are the agent's own needs.

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
        writable=WRITABLE,
    )


async def lay_out(sandbox: Sandbox, task: Task, files: Files) -> str:
    """Put the work tree into the sandbox; returns the commit that the patch will be taken against."""
    await sandbox.put(files, task.environment.workdir)
    if (commit := _head(files)) is not None:
        return commit
    done = await sandbox.exec(_BASELINE, timeout_s=_GIT_TIMEOUT_S, env=_IDENTITY)
    commit_line = done.stdout.strip()
    if done.exit_code != 0 or not _COMMIT.fullmatch(commit_line):
        raise SandboxError(f"{task.task_id}: git baseline failed: {_said(done)}")
    return commit_line.decode()


async def take_patch(sandbox: Sandbox, task: Task, files: Files, base: str) -> bytes:
    """What changed in the work tree since `base`, as a binary git diff; empty if nothing did.

    PatchTooLarge above PATCH_LIMIT; DataError if the work tree cannot be read; SandboxDied if the sandbox is gone.
    """
    done = await _diff(sandbox, "", base)
    if done.exit_code != 0 and not done.truncated:
        done = await _rescue(sandbox, task, files)
    if done.truncated:
        raise PatchTooLarge(f"the patch is larger than {PATCH_LIMIT} bytes")
    if done.exit_code != 0:
        raise DataError(f"the work tree cannot be read: {_said(done)}")
    return done.stdout


async def _diff(sandbox: Sandbox, where: str, base: str) -> ExecResult:
    command = f"git {where} " + _DIFF.format(where=where, base=base)
    return await sandbox.exec(command, timeout_s=_GIT_TIMEOUT_S, env=_IDENTITY, output_limit=PATCH_LIMIT)


async def _rescue(sandbox: Sandbox, task: Task, files: Files) -> ExecResult:
    """The same difference against a fresh baseline elsewhere: the repository is gone, broken or on a full disk."""
    plain = {path: file for path, file in files.items() if not path.startswith(".git/")}
    await sandbox.put(plain, _RESCUE)
    place = shlex.quote(sandbox.root + _RESCUE)
    made = await sandbox.exec(f"cd {place} && {_BASELINE}", timeout_s=_GIT_TIMEOUT_S, env=_IDENTITY)
    if made.exit_code != 0:
        return made
    where = f"--git-dir={place}/.git --work-tree={shlex.quote(sandbox.root + task.environment.workdir)}"
    return await _diff(sandbox, where, made.stdout.strip().decode())


async def apply_patch(sandbox: Sandbox, task: Task, patch: bytes) -> str:
    """Apply an agent's patch to the pristine work tree; returns why it does not apply, empty if it does."""
    if not patch:
        return ""
    paths = task.verifier.options.get("include", "").splitlines()
    include = " ".join(f"--include={shlex.quote(path)}" for path in paths)
    command = f"git apply --whitespace=nowarn {include} -"
    done = await sandbox.exec(command, timeout_s=_GIT_TIMEOUT_S, stdin=patch, env=_IDENTITY)
    return "" if done.exit_code == 0 else f"the patch does not apply: {_said(done)}"


def _head(files: Files) -> str | None:
    """The commit that a work tree's own `.git` stands on; None if there is no repository or its HEAD is packed."""
    head = files.get(".git/HEAD", (b"", 0))[0].strip()
    if head.startswith(b"ref: "):
        head = files.get(f".git/{head[5:].decode('utf-8', errors='replace')}", (b"", 0))[0].strip()
    return head.decode() if _COMMIT.fullmatch(head) else None


def _said(done: ExecResult) -> str:
    output = (done.stderr or done.stdout).decode("utf-8", errors="replace").strip()
    return f"{output[-500:]} [exit {done.exit_code}{', timed out' if done.timed_out else ''}]"
