"""The bubblewrap back end: namespaces, seccomp, cgroups and rlimits around one shell, without a daemon.

Owns the start and the end of a sandbox. Invariants: bwrap runs as an unprivileged user from the first instruction;
a sandbox sees only what stage.py shows; when this process dies in any way, everything inside dies (PDEATHSIG), and
what is left in the file system is removed by the next process that starts (`reap`). Everything is started from the
event loop's thread, because PDEATHSIG belongs to the thread that forks.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from kat_stream.env.sandboxes.apart import Entry, memory_file
from kat_stream.env.sandboxes.base import ENVIRONMENT, SandboxSpec
from kat_stream.env.sandboxes.bwrap_sandbox import INSIDE, BwrapSandbox, Parts, make, remove
from kat_stream.env.sandboxes.cgroups import Cgroup, Hierarchy
from kat_stream.env.sandboxes.owners import is_orphan, new_name
from kat_stream.env.sandboxes.seccomp import filter_program
from kat_stream.env.sandboxes.shell import ShellServer
from kat_stream.env.sandboxes.stage import (
    SANDBOX_UID,
    SHELL,
    PrivateStages,
    Stage,
    host_stage,
    system_directory,
    system_links,
)
from kat_stream.errors import SandboxError, SandboxUnavailable

_log = logging.getLogger(__name__)

_PROBE_DEADLINE_S = 10.0
_CONCURRENT_STARTS = 4  # more only queue for the CPU: research/sandboxes.md 5
_OPEN_FILES = 1024
_BLOCK = 512  # bytes; the unit of `ulimit -f`
_HIDDEN_SIZE = 4096
_ISOLATION = (
    "--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session", "--as-pid-1",
    "--hostname", "sandbox", "--clearenv", "--cap-drop", "ALL",
)  # fmt: skip


class BwrapBackend:
    """Sandboxes by bubblewrap >= 0.8; as root with cgroups, as an ordinary user with what `describe` says."""

    name = "bwrap"
    isolated = True

    def __init__(self) -> None:
        self._root = os.geteuid() == 0
        self._uid = SANDBOX_UID if self._root else os.getuid()
        self._gid = SANDBOX_UID if self._root else os.getgid()
        self._runs = _run_directory(self._root)
        self._etc = system_directory(_cache_directory(), self._uid, self._gid)
        self._filter = filter_program()
        self._hierarchy = Hierarchy.detect() if self._root else None
        self._stages = PrivateStages(self._etc, self._runs)
        self._slots = asyncio.Semaphore(_CONCURRENT_STARTS)
        self._alive: set[BwrapSandbox] = set()
        self._swept = False

    @classmethod
    def probe(cls) -> str:
        """Starts one sandbox of nothing but /usr (some 10 ms)."""
        root = os.geteuid() == 0
        missing = [tool for tool in ("bwrap", *(("nsenter", "unshare") if root else ())) if shutil.which(tool) is None]
        if missing:
            return f"not installed: {', '.join(missing)}"
        links = [word for path, target in system_links().items() for word in ("--symlink", target, path)]
        command = ["bwrap", *_ISOLATION, "--ro-bind", "/usr", "/usr", *links, "--proc", "/proc", "/usr/bin/true"]
        user = {"user": SANDBOX_UID, "group": SANDBOX_UID, "extra_groups": []} if root else {}
        try:
            done = subprocess.run(command, capture_output=True, timeout=_PROBE_DEADLINE_S, cwd="/", **user)  # type: ignore[call-overload]
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        return "" if done.returncode == 0 else done.stderr.decode(errors="replace").strip()

    def describe(self) -> dict[str, str]:
        version = None if self._hierarchy is None else self._hierarchy.version
        group = f"cgroup v{version}" if version else ""
        return {
            "memory_mb": group or "RLIMIT_DATA of each process; their sum is not enforced",
            "pids": group or "RLIMIT_NPROC in the sandbox's user namespace (Linux >= 5.14)",
            "cpus": group or "not enforced",
            "disk_mb": "tmpfs size of each writable directory; the number of files is not enforced",
            "wall_s": "timer of the controller",
            "network": "own network namespace with loopback only",
            "user": f"uid {self._uid}, no capabilities, no further user namespaces, seccomp",
        }

    async def create(self, spec: SandboxSpec, *, owner: str = "") -> BwrapSandbox:
        async with self._slots:
            if not self._swept:
                self._swept = True
                await self.reap()
            name = new_name()
            directory = self._make_directory(name)
            try:
                return await self._start(name, directory, spec, owner)
            except BaseException as error:  # also when cancelled: nothing stays behind, and it is raised again
                # It is empty, and this takes no descriptor, of which there may be none left.
                with suppress(OSError):
                    directory.rmdir()
                if isinstance(error, OSError):
                    raise SandboxUnavailable(f"cannot start a sandbox: {error}") from error
                raise

    async def reap(self) -> int:
        groups = self._hierarchy.find() if self._hierarchy is not None else []
        orphans = {name for name in (*groups, *(p.name for p in self._runs.iterdir())) if is_orphan(name)}
        for name in orphans:
            if self._hierarchy is not None:
                await self._hierarchy.open(name).empty_and_remove()
            remove(self._runs / name)
        if orphans:
            _log.warning("removed %d sandboxes of dead owners", len(orphans))
        return len(orphans)

    async def close(self) -> None:
        results = await asyncio.gather(*(s.destroy() for s in tuple(self._alive)), return_exceptions=True)
        self._stages.close()
        for result in results:
            if isinstance(result, BaseException):
                raise result

    def _make_directory(self, name: str) -> Path:
        directory = self._runs / name
        make(directory)
        if self._root:
            os.chown(directory, self._uid, self._gid)
        return directory

    async def _start(self, name: str, directory: Path, spec: SandboxSpec, owner: str) -> BwrapSandbox:
        group = self._make_group(name, spec)
        prelude = _prelude(spec, group)
        try:
            process, info = self._spawn(name, spec, prelude)
        except BaseException:  # also when cancelled: nothing stays behind, and it is raised again
            if group is not None:
                await group.empty_and_remove()
            raise
        server = ShellServer(process, directory, INSIDE)
        entry = Entry(self._uid, self._gid, prelude, self._filter)
        parts = Parts(process, server, directory, group, entry, self._root, self._alive.discard)
        sandbox = BwrapSandbox(name, spec, owner, parts)
        self._alive.add(sandbox)
        try:
            await sandbox.greet(server)
            sandbox.adopt(_child_of(info))
        except BaseException:  # also when cancelled: nothing stays behind, and it is raised again
            await sandbox.destroy()
            raise
        finally:
            os.close(info)
        return sandbox

    def _make_group(self, name: str, spec: SandboxSpec) -> Cgroup | None:
        if self._hierarchy is None:
            return None
        try:
            # Two more for bwrap itself and the command server.
            return self._hierarchy.create(name, memory_mb=spec.memory_mb, pids=spec.pids + 2, cpus=spec.cpus)
        except OSError as error:
            raise SandboxUnavailable(f"cgroup: {error}") from error

    def _spawn(self, name: str, spec: SandboxSpec, prelude: str) -> tuple[subprocess.Popen[bytes], int]:
        stage = self._stages.get(spec.mounts) if self._root else host_stage(self._etc, self._runs, spec.mounts)
        with ExitStack() as kept, ExitStack() as passed_on:
            info, info_inside = os.pipe()
            kept.callback(os.close, info)
            passed_on.callback(os.close, info_inside)
            filters = memory_file(self._filter, passed_on)
            options = [*bwrap_options(stage, name, spec), "--seccomp", str(filters), "--info-fd", str(info_inside)]
            arguments = memory_file("\0".join(options).encode(errors="surrogateescape"), passed_on)
            process = subprocess.Popen(
                ["/bin/sh", "-c", f"{prelude}\nexec {self._enter(stage)}bwrap --args {arguments} -- {SHELL}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                bufsize=0,
                pass_fds=(arguments, filters, info_inside),
                cwd="/",
                env={},
                process_group=0,  # a terminal's Ctrl-C is for this process: it must not reach into sandboxes
            )
            kept.pop_all()
        return process, info

    def _enter(self, stage: Stage) -> str:
        """What goes before bwrap: into the stage, as the sandbox's user; nothing where there is no such stage."""
        if stage.namespace is None:
            return ""
        return f"nsenter --mount={stage.namespace} --setuid {self._uid} --setgid {self._gid} "


def _prelude(spec: SandboxSpec, group: Cgroup | None) -> str:
    """Script that makes a process one of the sandbox: in its cgroups, below its rlimits."""
    joins = [] if group is None else [f"echo 0 >{shlex.quote(str(file))} || exit 70" for file in group.join_files]
    limits = [f"ulimit -n {_OPEN_FILES}", "ulimit -c 0", f"ulimit -f {(spec.disk_mb << 20) // _BLOCK}"]
    if group is None:
        limits.append(f"ulimit -d {spec.memory_mb << 10}")
    return "\n".join([*joins, *limits, f"PATH={ENVIRONMENT['PATH']}; export PATH"])


def bwrap_options(stage: Stage, name: str, spec: SandboxSpec) -> list[str]:
    """The arguments of bwrap that make the new root; later ones lie over earlier ones."""
    size = str(spec.disk_mb << 20)
    # Sorted, a directory comes before those inside it.
    writable = sorted({ENVIRONMENT["HOME"], spec.workdir, *spec.writable})
    hidden = [directory for directory in _hidden(writable) if directory not in writable]
    options = [*_ISOLATION, "--ro-bind", "/usr", "/usr"]
    for directory in hidden:
        options += ["--size", str(_HIDDEN_SIZE), "--tmpfs", directory, *_system_inside(directory)]
    for path, target in system_links().items():
        options += ["--symlink", target, path]
    options += ["--ro-bind", stage.etc, "/etc", "--proc", "/proc", "--dev", "/dev"]
    # bwrap's /dev is a tmpfs without a limit.
    options += ["--size", size, "--perms", "1777", "--tmpfs", "/dev/shm", "--remount-ro", "/dev"]
    options += ["--size", size, "--perms", "1777", "--tmpfs", "/tmp"]
    for directory in writable:
        options += ["--size", size, "--tmpfs", directory]
    options += ["--ro-bind", f"{stage.runs}/{name}", INSIDE]
    for mount in stage.mounts:
        options += ["--ro-bind", mount.source, mount.target]
    for variable, value in {**ENVIRONMENT, **spec.env}.items():
        options += ["--setenv", variable, value]
    for directory in (*hidden, "/"):
        options += ["--remount-ro", directory]
    return [*options, "--chdir", spec.workdir]


def _hidden(writable: Sequence[str]) -> list[str]:
    """Directories of the host's /usr that an empty one covers, in which places for others are made.

    What the host's administrator put into /usr/local is no part of the system (docker clients, project tools with
    secrets in them); a toolchain that lives there is shown by naming it in `mounts`. Nor are sources in /usr/src.
    """
    inside = {path.split("/")[2] for path in writable if path.startswith("/usr/")}
    above = ["/usr"] if any(not Path("/usr", name).exists() for name in inside) else []
    return [*above, "/usr/local", *(["/usr/src"] if "src" in inside else [])]


def _system_inside(directory: str) -> list[str]:
    """Options that show the host's /usr in the empty one that covers it, entry by entry."""
    if directory != "/usr":
        return []
    return [word for path in sorted(Path("/usr").iterdir()) for word in ("--ro-bind", str(path), str(path))]


def _child_of(info: int) -> int:
    """Host process id of the sandbox's process 1, from bwrap's --info-fd."""
    return int(json.loads(os.read(info, 1 << 16))["child-pid"])


def _run_directory(root: bool) -> Path:
    """Where sandboxes keep their pipes: entered by name, not listed, by others."""
    base = "/run" if root else os.environ.get("XDG_RUNTIME_DIR", "")
    path = Path(base) / "kat-stream" if base else Path(f"/tmp/kat-stream-{os.getuid()}")
    with suppress(FileExistsError):
        path.mkdir(mode=0o711)
    if path.is_symlink() or path.stat().st_uid != os.geteuid():
        raise SandboxError(f"{path} belongs to somebody else")
    path.chmod(0o711)
    return path


def _cache_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kat-stream" / "sandboxes"
