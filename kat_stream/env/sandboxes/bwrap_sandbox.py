"""One running bubblewrap sandbox.

Owns its processes, pipes, group and directory from start to end. Invariants: one command at a time; every call
returns or raises in bounded time whatever happens inside; a timeout kills what was born since the command began and
nothing else; `destroy` gives back everything.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kat_stream.env.sandboxes.apart import Entry, start_apart
from kat_stream.env.sandboxes.base import (
    GATEWAY_PORT,
    OUTPUT_LIMIT,
    TIMED_OUT,
    ExecResult,
    SandboxSpec,
    check_variables,
)
from kat_stream.env.sandboxes.cgroups import Cgroup
from kat_stream.env.sandboxes.files import FileTransfer
from kat_stream.env.sandboxes.life import Life
from kat_stream.env.sandboxes.netns import listen_as_root, listen_as_user
from kat_stream.env.sandboxes.processes import descendants, ended, first_of, kill_all
from kat_stream.env.sandboxes.shell import Exchange, ShellServer
from kat_stream.errors import DeadlineExceeded, SandboxDied, SandboxError, SandboxUnavailable
from kat_stream.whole import whole

INSIDE = "/run/kat-stream"
"""Where a sandbox sees its own directory of pipes."""

_START_DEADLINE_S = 10.0
_STOP_DEADLINE_S = 3.0
_ROUND_S = 0.002
_END_DEADLINE_S = 30.0
_REAP_S = 1.0


@dataclass(frozen=True)
class Parts:
    """What a sandbox is made of on the host's side."""

    process: subprocess.Popen[bytes]
    server: ShellServer
    directory: Path
    group: Cgroup | None
    entry: Entry
    root: bool
    forget: Callable[[BwrapSandbox], None]


class BwrapSandbox(FileTransfer, Life):
    """See base.Sandbox."""

    root = ""

    def __init__(self, name: str, spec: SandboxSpec, owner: str, parts: Parts) -> None:
        super().__init__()
        self.id, self.spec, self.owner = name, spec, owner
        self.peak_memory_bytes = 0
        """Of everything inside together, known once it was destroyed; 0 without cgroups."""
        self._parts, self._server = parts, parts.server
        self._apart: subprocess.Popen[bytes] | None = None
        self._child = 0
        self._child_handle = -1
        self._listeners: list[socket.socket] = []
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(spec.wall_s, self._kill, f"its wall time of {spec.wall_s:g} s is over")
        self._reaping: asyncio.TimerHandle | None = None

    async def greet(self, server: ShellServer) -> None:
        """Wait until a shell answers, which collects the dead and, without cgroups, limits its own processes."""
        # -u in bash, -p in dash.
        processes = f"ulimit -u {self.spec.pids + 1} 2>/dev/null || ulimit -p {self.spec.pids + 1}"
        answer = server.ask("jobs" if self._parts.group is not None else f"jobs; {processes}")
        await asyncio.wait({answer}, timeout=_START_DEADLINE_S)
        if not answer.done():
            raise DeadlineExceeded(f"start of a sandbox {server.noise}".strip(), _START_DEADLINE_S)
        try:
            code = answer.result()
        except SandboxDied as error:
            raise SandboxUnavailable(f"bwrap: {server.noise or error}") from None
        if code != 0:
            raise SandboxUnavailable(f"cannot limit the sandbox: {server.noise}")

    def adopt(self, pid: int) -> None:
        """Take hold of process 1, by a handle that no other process can get the number of."""
        self._child, self._child_handle = pid, os.pidfd_open(pid)

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
        name = _new_name()
        async with self._alone(timeout_s):
            script = self._server.program(name, command, env or {})
            exchange = Exchange(name, script, stdin, merge_stderr, output_limit)
            return await self._run(exchange, timeout_s, asyncio.Event())

    async def hand_over(self, directories: Sequence[str]) -> None:
        async with self._alone(_START_DEADLINE_S):
            await self._end_apart()
            parts = self._parts
            # Who was just killed takes a place in the process table until it is collected.
            await self.greet(parts.server)
            self._apart = start_apart(parts.entry, self._child, self.spec, directories)
            self._server = ShellServer(self._apart, parts.directory, INSIDE)
            await self.greet(self._server)

    async def kill_leftovers(self) -> None:
        async with self._alone(_STOP_DEADLINE_S):
            own = {self._child} if self._apart is None else {self._child, *_tree(self._apart.pid)}
            await whole(self._stop(None, own))

    async def listen(self, port: int = GATEWAY_PORT) -> socket.socket:
        if self.spec.network != "gateway":
            raise SandboxError("this sandbox was made without a network (network='none')")
        self._check_alive()
        if self._parts.root:
            listener = listen_as_root(self._child, port)
        else:
            listener = await listen_as_user(self._child, port)
        self._listeners.append(listener)
        return listener

    def base_url(self, port: int = GATEWAY_PORT) -> str:
        return f"http://127.0.0.1:{port}"

    async def _transfer(self, command: Sequence[str], *, timeout_s: float, stdin: bytes, limit: int) -> ExecResult:
        name = _new_name()
        async with self._alone(timeout_s):
            full = asyncio.Event()
            script = self._server.program(name, command, {})
            return await self._run(Exchange(name, script, stdin, False, limit, full.set), timeout_s, full)

    async def _run(self, exchange: Exchange, timeout_s: float, full: asyncio.Event) -> ExecResult:
        before = self._members()
        began = time.monotonic()
        answer, collect = self._server.start(exchange)
        try:
            await first_of(answer, full, timeout_s)
            timed_out = not answer.done() and not full.is_set()
        finally:
            # Also when the caller is cancelled: the next command must find the shell idle.
            if not answer.done():
                await whole(self._stop(answer, before))
            output = collect()
            self._reap_later()
        code = TIMED_OUT if timed_out else answer.result()
        seconds = time.monotonic() - began
        return ExecResult(code, output.stdout, output.stderr, timed_out, output.truncated, seconds)

    def _check_alive(self) -> None:
        # Of a second server, which processes inside can kill, the next command says it itself.
        self._parts.server.check_alive()

    def _reap_later(self) -> None:
        if self._reaping is None:
            self._reaping = asyncio.get_running_loop().call_later(_REAP_S, self._reap)

    def _reap(self) -> None:
        """Between commands the shell waits for nobody; daemons go on, and somebody has to collect what they leave."""
        self._reaping = None
        # While a command of its own runs the shell reaps as it waits for it, and the command's end comes back to this.
        if self._server.died_of or (self._one.locked() and self._apart is None):
            return
        self._parts.server.reap()
        if self._members() - {self._child, self._parts.process.pid}:
            self._reap_later()

    def _members(self) -> set[int]:
        """Host process ids of what runs inside now."""
        group = self._parts.group
        if group is not None:
            return group.processes() | {self._child}
        return _tree(self._child) | (_tree(self._apart.pid) if self._apart is not None else set())

    async def _stop(self, answer: asyncio.Future[int] | None, spared: set[int]) -> None:
        """Kill what was born since `spared` was taken; the whole sandbox if that does not end the command."""
        end = time.monotonic() + _STOP_DEADLINE_S
        spared = spared | {self._parts.process.pid}
        while await self._kill_newer(spared) or not (answer is None or answer.done()):
            if time.monotonic() > end:
                self._kill("a command could not be stopped")
                return
            await asyncio.sleep(_ROUND_S)

    async def _kill_newer(self, spared: set[int]) -> bool:
        """Whether there was anything to kill; frozen meanwhile, where that is possible, so that nothing is missed."""
        group = self._parts.group
        try:
            if group is not None and self._members() - spared:
                await group.freeze()
            newer = self._members() - spared
            kill_all(newer)
        finally:
            if group is not None:
                group.thaw()
        return bool(newer)

    def _kill(self, reason: str) -> None:
        """End everything inside at once; process 1 takes all others with it."""
        self._server.close(reason)
        self._parts.server.close(reason)
        handle = self._child_handle
        with suppress(ProcessLookupError):
            if handle >= 0:
                signal.pidfd_send_signal(handle, signal.SIGKILL)
            else:
                self._parts.process.kill()

    async def _end_apart(self) -> None:
        """End the server of an earlier hand_over, if there was one, and with it the directories that were its own."""
        if self._apart is None:
            return
        self._server.close("the sandbox was handed over again")
        kill_all(_tree(self._apart.pid))
        if not await ended(self._apart, _STOP_DEADLINE_S):
            raise DeadlineExceeded(f"end of a command server in {self.id}", _STOP_DEADLINE_S)
        _close_pipes(self._apart)
        self._apart, self._server = None, self._parts.server

    async def _end(self) -> None:
        parts = self._parts
        self._timer.cancel()
        if self._reaping is not None:
            self._reaping.cancel()
        self._kill("it was destroyed")
        for listener in self._listeners:
            listener.close()
        started = [parts.process] if self._apart is None else [parts.process, self._apart]
        gone = all([await ended(process, _END_DEADLINE_S) for process in started])
        if parts.group is not None:
            self.peak_memory_bytes = parts.group.peak_memory_bytes()
            gone = await parts.group.empty_and_remove() and gone
        remove(parts.directory)
        for process in started:
            _close_pipes(process)
        if self._child_handle >= 0:
            os.close(self._child_handle)
            self._child_handle = -1
        parts.forget(self)
        if not gone:
            raise DeadlineExceeded(f"end of sandbox {self.id}", _END_DEADLINE_S)


def make(directory: Path) -> None:
    """A directory of pipes whose names nobody can list inside: to write into one that is not its own takes a guess."""
    directory.mkdir(mode=0o300)


def remove(directory: Path) -> None:
    """Remove such a directory, as far as it is there."""
    with suppress(OSError):
        directory.chmod(0o700)
    shutil.rmtree(directory, ignore_errors=True)


def _close_pipes(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.close()
    process.stdout.close()


def _new_name() -> str:
    return secrets.token_hex(8)


def _tree(pid: int) -> set[int]:
    return descendants(pid) | {pid}
