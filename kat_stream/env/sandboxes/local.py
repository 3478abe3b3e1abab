"""The local back end: a private directory and a process group. It isolates NOTHING.

Owns the directory and whatever carries the sandbox's mark in its environment. Invariant: it is never chosen by
default, only by name and with `allow_unsafe`, and says so loudly. For machines without bubblewrap, and for code
that you trust as much as your own shell.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kat_stream.env.sandboxes.base import (
    ENVIRONMENT,
    GATEWAY_PORT,
    OUTPUT_LIMIT,
    TIMED_OUT,
    ExecResult,
    SandboxSpec,
    check_variables,
)
from kat_stream.env.sandboxes.files import FileTransfer
from kat_stream.env.sandboxes.life import Life
from kat_stream.env.sandboxes.output import OutputPipe
from kat_stream.env.sandboxes.owners import is_orphan, new_name
from kat_stream.env.sandboxes.processes import descendants, ended, first_of, kill_all, marked
from kat_stream.env.sandboxes.shell import script_of
from kat_stream.errors import ConfigError, DeadlineExceeded, SandboxDied, SandboxError, SandboxUnavailable
from kat_stream.whole import whole

_log = logging.getLogger(__name__)

_SANDBOX, _COMMAND = "KAT_STREAM_SANDBOX", "KAT_STREAM_COMMAND"
_STOP_DEADLINE_S = 3.0
_ROUND_S = 0.005
# An agent that worked here may have left links, and directories without any permission.
_EMPTY = (
    'for place in "$@"; do '
    '[ -L "$place" ] || chmod -R u+rwx -- "$place"; rm -rf -- "$place" && mkdir -p -- "$place" || exit 1; done'
)
_ARGUMENT_LIMIT = 100_000  # characters
_BLOCK = 512  # bytes; the unit of `ulimit -f`


class LocalBackend:
    """Commands run as the user of this process, with the host's file system and network before them."""

    name = "local"
    isolated = False

    def __init__(self, *, allow_unsafe: bool) -> None:
        if not allow_unsafe:
            raise ConfigError("sandbox back end 'local' isolates nothing; it runs only with allow_unsafe = true")
        _log.warning("sandbox back end 'local': agents run WITHOUT ISOLATION as uid %d on this machine", os.getuid())
        self._base = Path(tempfile.gettempdir()) / f"kat-stream-local-{os.getuid()}"
        with suppress(FileExistsError):
            self._base.mkdir(mode=0o700)
        if self._base.is_symlink() or self._base.stat().st_uid != os.geteuid():
            raise SandboxUnavailable(f"{self._base} belongs to somebody else")
        self._alive: set[LocalSandbox] = set()
        self._swept = False

    @classmethod
    def probe(cls) -> str:
        return "" if Path("/proc/self/environ").exists() else "needs Linux"

    def describe(self) -> dict[str, str]:
        return {
            "memory_mb": "RLIMIT_DATA of each process; their sum is not enforced",
            "pids": "not enforced",
            "cpus": "not enforced",
            "disk_mb": "RLIMIT_FSIZE of each file; their sum is not enforced",
            "wall_s": "timer of the controller",
            "network": "not isolated: the host's",
            "user": f"not isolated: uid {os.getuid()}, the host's files",
        }

    async def create(self, spec: SandboxSpec, *, owner: str = "") -> LocalSandbox:
        if not self._swept:
            self._swept = True
            await self.reap()
        name = new_name()
        root = self._base / name
        try:
            _lay_out(root, spec)
        except OSError as error:
            shutil.rmtree(root, ignore_errors=True)
            raise SandboxUnavailable(f"cannot make {root}: {error}") from error
        sandbox = LocalSandbox(name, spec, owner, root, self._alive.discard)
        self._alive.add(sandbox)
        return sandbox

    async def reap(self) -> int:
        orphans = [path.name for path in self._base.iterdir() if is_orphan(path.name)]
        for name in orphans:
            kill_all(marked(f"{_SANDBOX}={name}"))
            shutil.rmtree(self._base / name, ignore_errors=True)
        return len(orphans)

    async def close(self) -> None:
        await asyncio.gather(*(sandbox.destroy() for sandbox in tuple(self._alive)))


@dataclass(frozen=True)
class _Request:
    command: str | Sequence[str]
    stdin: bytes
    env: Mapping[str, str]
    merge_stderr: bool
    limit: int
    stop_when_full: bool = False


class LocalSandbox(FileTransfer, Life):
    """See base.Sandbox; `root` is a private directory that stands for the root of the file system."""

    def __init__(
        self, name: str, spec: SandboxSpec, owner: str, root: Path, gone: Callable[[LocalSandbox], None]
    ) -> None:
        super().__init__()
        self.id, self.spec, self.owner, self.root, self._gone = name, spec, owner, str(root), gone
        self._died_of = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._listeners: dict[int, socket.socket] = {}
        self._pipes: list[OutputPipe] = []
        self._names = itertools.count()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(spec.wall_s, self._kill, f"its wall time of {spec.wall_s:g} s is over")

    async def exec(
        self,
        command: str | Sequence[str],
        *,
        timeout_s: float,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        merge_stderr: bool = False,
        output_limit: int = OUTPUT_LIMIT,
    ) -> ExecResult:
        check_variables(env or {})
        script_of(command, env or {})
        async with self._alone(timeout_s):
            return await self._run(_Request(command, stdin, env or {}, merge_stderr, output_limit), timeout_s)

    async def kill_leftovers(self) -> None:
        async with self._alone(_STOP_DEADLINE_S):
            if not await _kill_until_gone(lambda: marked(f"{_SANDBOX}={self.id}")):
                self._kill("what commands left running could not be stopped")

    async def hand_over(self, directories: Sequence[str]) -> None:
        done = await self._script(_EMPTY, directories, limit=OUTPUT_LIMIT)
        if done.exit_code != 0:
            raise SandboxError(f"cannot empty {', '.join(directories)}: {done.stderr.decode(errors='replace')[-500:]}")

    async def listen(self, port: int = GATEWAY_PORT) -> socket.socket:
        if self.spec.network != "gateway":
            raise SandboxError("this sandbox was made without a network (network='none')")
        self._check_alive()
        if port in self._listeners:
            raise SandboxError(f"cannot listen on port {port} in the sandbox: it is in use")
        self._listeners[port] = listener = socket.create_server(("127.0.0.1", 0))
        listener.setblocking(False)
        return listener

    def base_url(self, port: int = GATEWAY_PORT) -> str:
        if port not in self._listeners:
            raise SandboxError(f"nobody listens on port {port} of the sandbox")
        return f"http://127.0.0.1:{self._listeners[port].getsockname()[1]}"

    async def _end(self) -> None:
        self._timer.cancel()
        self._kill("it was destroyed")
        for pipe in self._pipes:
            pipe.close()
        for listener in self._listeners.values():
            listener.close()
        # A command that runs now comes to its end before its directory goes.
        async with self._one:
            all_ended = await _kill_until_gone(lambda: marked(f"{_SANDBOX}={self.id}"))
            shutil.rmtree(self.root, ignore_errors=True)
        self._gone(self)
        if not all_ended:
            raise DeadlineExceeded(f"end of sandbox {self.id}", _STOP_DEADLINE_S)

    async def _transfer(self, command: Sequence[str], *, timeout_s: float, stdin: bytes, limit: int) -> ExecResult:
        async with self._alone(timeout_s):
            return await self._run(_Request(command, stdin, {}, False, limit, stop_when_full=True), timeout_s)

    def _check_alive(self) -> None:
        if self._died_of:
            raise SandboxDied(self._died_of)

    async def _run(self, request: _Request, timeout_s: float) -> ExecResult:
        mark = f"{_COMMAND}={self.id}.{next(self._names)}"
        full = asyncio.Event()
        began = time.monotonic()
        process, out, err = self._spawn(request, mark, full.set if request.stop_when_full else None)
        self._process = process
        end = asyncio.ensure_future(ended(process, timeout_s))
        try:
            await first_of(end, full, timeout_s)
            timed_out = process.poll() is None and not full.is_set()
        finally:
            # Also when the caller is cancelled.
            end.cancel()
            if process.poll() is None:
                await whole(self._stop(process, mark))
            stdout, stderr = out.finish(), b"" if err is None else err.finish()
        self._check_alive()
        code = TIMED_OUT if timed_out else _exit_code(process)
        truncated = out.truncated or (err is not None and err.truncated)
        return ExecResult(code, stdout, stderr, timed_out, truncated, time.monotonic() - began)

    def _spawn(
        self, request: _Request, mark: str, when_full: Callable[[], None] | None
    ) -> tuple[subprocess.Popen[bytes], OutputPipe, OutputPipe | None]:
        (out, out_end), (err, err_end) = os.pipe(), (os.pipe() if not request.merge_stderr else (-1, subprocess.STDOUT))
        try:
            with tempfile.TemporaryFile() as stdin:
                stdin.write(request.stdin)
                stdin.seek(0)
                process = subprocess.Popen(
                    self._command_line(request),
                    stdin=stdin,
                    stdout=out_end,
                    stderr=err_end,
                    cwd=self.root + self.spec.workdir,
                    env=self._environment(request.env, mark),
                    start_new_session=True,
                )
        finally:
            for descriptor in (out_end, *(() if request.merge_stderr else (err_end,))):
                os.close(descriptor)
        errors = None if err < 0 else self._collect(err, request, when_full)
        return process, self._collect(out, request, when_full), errors

    def _collect(self, descriptor: int, request: _Request, when_full: Callable[[], None] | None) -> OutputPipe:
        os.set_blocking(descriptor, False)
        pipe = OutputPipe(descriptor, request.limit, when_full)
        self._pipes = [p for p in self._pipes if p.open] + [pipe]
        return pipe

    def _command_line(self, request: _Request) -> list[str]:
        """The command below its rlimits. Text goes through a file: one argument holds at most 128 KiB."""
        spec = self.spec
        limits = f"ulimit -c 0; ulimit -f {(spec.disk_mb << 20) // _BLOCK}; ulimit -d {spec.memory_mb << 10}; "
        if not isinstance(request.command, str):
            return ["/bin/sh", "-c", limits + 'exec "$@"', "sh", *request.command]
        if len(request.command) < _ARGUMENT_LIMIT:
            return ["/bin/sh", "-c", limits + 'exec /bin/sh -c "$1"', "sh", request.command]
        script = Path(self.root) / ".command"
        script.write_bytes(request.command.encode(errors="surrogateescape"))
        return ["/bin/sh", "-c", limits + 'exec /bin/sh "$1"', "sh", str(script)]

    def _environment(self, env: Mapping[str, str], mark: str) -> dict[str, str]:
        """Nothing of ours goes in, for it holds keys; the marks make every descendant findable."""
        name, _, value = mark.partition("=")
        base = {**ENVIRONMENT, "HOME": self.root + ENVIRONMENT["HOME"], "TMPDIR": f"{self.root}/tmp"}
        return {**base, **self.spec.env, **env, _SANDBOX: self.id, name: value}

    async def _stop(self, process: subprocess.Popen[bytes], mark: str) -> None:
        """Kill the command's process tree, or the whole sandbox if that does not end it."""
        if not await _kill_until_gone(lambda: _tree(process) | marked(mark)):
            self._kill("a command could not be stopped")

    def _kill(self, reason: str) -> None:
        self._died_of = self._died_of or reason
        kill_all(_tree(self._process) | marked(f"{_SANDBOX}={self.id}"))


def _tree(process: subprocess.Popen[bytes] | None) -> set[int]:
    """A command and what descends from it, as long as it has not been reaped."""
    return descendants(process.pid) | {process.pid} if process is not None and process.poll() is None else set()


async def _kill_until_gone(find: Callable[[], set[int]]) -> bool:
    """Kill what `find` finds, in rounds, since it may go on forking; False if that takes too long."""
    end = time.monotonic() + _STOP_DEADLINE_S
    quiet = 0
    # Twice nothing: in the middle of its exec a process has no environment to be found by.
    while quiet < 2 and time.monotonic() < end:
        found = find()
        kill_all(found)
        quiet = 0 if found else quiet + 1
        await asyncio.sleep(_ROUND_S)
    return quiet == 2


def _lay_out(root: Path, spec: SandboxSpec) -> None:
    root.mkdir(mode=0o700)
    for directory in (spec.workdir, "/tmp", "/home/agent", *spec.writable):
        Path(f"{root}{directory}").mkdir(parents=True, exist_ok=True)
    for mount in spec.mounts:
        target = Path(f"{root}{mount.target}")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(mount.source)


def _exit_code(process: subprocess.Popen[bytes]) -> int:
    code = process.poll()
    assert code is not None, "only asked after the end"
    return code if code >= 0 else 128 - code
