"""What a sandbox is: the records and the protocol every back end keeps.

Owns the vocabulary (spec, mount, result, sandbox, back end) and no mechanism. Invariant: everything a caller may
rely on is written here, so that one contract suite (tests/contract/sandbox_kit.py) holds for every back end.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, Self, runtime_checkable

from kat_stream.errors import ConfigError

GATEWAY_PORT = 8080
"""TCP port on 127.0.0.1 inside the sandbox on which agents find the gateway."""

OUTPUT_LIMIT = 1 << 20
"""Bytes kept of each output stream of one command, half from its beginning and half from its end, unless the caller
asks for another number."""

ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME": "/home/agent", "LANG": "C.UTF-8"}
"""What commands find set, HOME below `root`, unless the spec or their caller sets it otherwise."""

TIMED_OUT = 124
"""Exit code of a command that was stopped at its timeout, as timeout(1) gives it."""

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Mount:
    """A host directory or file shown read-only inside; `source` and `target` are absolute paths."""

    source: str
    target: str


@dataclass(frozen=True)
class SandboxSpec:
    """What one sandbox is made of. `disk_mb` bounds each writable directory by itself, `wall_s` its whole life."""

    workdir: str = "/work"
    env: Mapping[str, str] = field(default_factory=dict)
    memory_mb: int = 512
    pids: int = 128
    cpus: float = 1.0
    disk_mb: int = 64
    wall_s: float = 600.0
    network: Literal["none", "gateway"] = "none"
    mounts: tuple[Mount, ...] = ()
    writable: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_limits(self)
        check_variables(self.env)
        for path in (self.workdir, *self.writable, *(m.source for m in self.mounts), *(m.target for m in self.mounts)):
            _check_path(path)


@dataclass(frozen=True)
class ExecResult:
    """The end of one command. `exit_code` is 128+n after signal n and 124 after a timeout; `seconds` is wall time.

    `truncated`: a stream was longer than its limit, and between its first and its last half stands a line that says how
    many bytes were left out.
    """

    exit_code: int
    stdout: bytes
    stderr: bytes
    timed_out: bool
    truncated: bool
    seconds: float


class Sandbox(Protocol):
    """One isolated machine. Commands run one at a time, in order; every method may raise SandboxDied.

    `root` is what a caller puts before an absolute path in a *command* ("" where the sandbox has a root of its own);
    paths given to put, get and read_file are absolute inside the sandbox, or relative to the workdir.
    """

    id: str
    spec: SandboxSpec
    root: str

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
        """Run a command in the workdir; at `timeout_s` its whole process tree is killed.

        A string goes to `/bin/sh -c`. Waiting for the command before it counts separately, up to `timeout_s` again.
        """

    async def put(self, files: Mapping[str, tuple[bytes, int]], directory: str) -> None:
        """Write files, {path relative to directory: (content, mode)}; missing directories are made."""

    async def put_tar(self, tar: bytes, directory: str) -> None:
        """Unpack an uncompressed tar archive below `directory`, as the sandbox's own user."""

    async def get(self, paths: Sequence[str] | str, *, limit_bytes: int) -> bytes:
        """The paths as an uncompressed tar made inside: symbolic links as links, hard links as files.

        Names in it are absolute paths without the first `/`. FileNotFoundError for a missing path, SandboxError above
        the limit.
        """

    async def read_file(self, path: str, limit_bytes: int) -> bytes:
        """One regular file; FileNotFoundError when it is not there, SandboxError when above the limit or not a file."""

    async def kill_leftovers(self) -> None:
        """Kill whatever earlier commands have left running, whoever they were for (hand_over)."""

    async def hand_over(self, directories: Sequence[str]) -> None:
        """Work for somebody else from now on: later commands find these directories of the spec empty.

        What runs already goes on, and neither sees nor reaches what is in them from now on, nor what later commands
        read and write through their pipes, where the back end isolates. SandboxError if the sandbox, as it was left,
        does not allow it.
        """

    async def listen(self, port: int = GATEWAY_PORT) -> socket.socket:
        """A listening TCP socket of this process, at which the sandbox finds `base_url(port)`; not blocking."""

    def base_url(self, port: int = GATEWAY_PORT) -> str:
        """The URL under which commands inside reach the socket made by listen(port)."""

    async def destroy(self) -> None:
        """Kill everything inside and give everything back; may be called any number of times."""

    async def __aenter__(self) -> Self:
        """The sandbox itself; leaving the block destroys it."""

    async def __aexit__(self, *exc: object) -> None:
        """Destroy."""


@runtime_checkable
class SandboxBackend(Protocol):
    """Makes sandboxes of one kind. All calls come from the thread that runs the event loop."""

    name: str
    isolated: bool

    @classmethod
    def probe(cls) -> str:
        """Why this back end cannot work on this machine; empty if it can."""

    def describe(self) -> dict[str, str]:
        """Each limit and how it is enforced here, or `not enforced`."""

    async def create(self, spec: SandboxSpec, *, owner: str = "") -> Sandbox:
        """A fresh sandbox; SandboxUnavailable if it cannot be made, DeadlineExceeded if it does not come up."""

    async def reap(self) -> int:
        """Remove what dead owners left behind; how many sandboxes that were."""

    async def close(self) -> None:
        """Destroy every sandbox of this back end."""


def check_variables(env: Mapping[str, str]) -> None:
    """ConfigError for a name or value that cannot be an environment variable."""
    for name, value in env.items():
        if not _VARIABLE.fullmatch(name):
            raise ConfigError(f"environment variable {name!r}: not a name")
        if "\0" in value:
            raise ConfigError(f"environment variable {name}: the value holds a NUL byte")


def _check_limits(spec: SandboxSpec) -> None:
    for name in ("memory_mb", "pids", "cpus", "disk_mb", "wall_s"):
        if not getattr(spec, name) > 0:
            raise ConfigError(f"sandbox {name} = {getattr(spec, name)!r}: must be above 0")
    if spec.network not in ("none", "gateway"):
        raise ConfigError(f"sandbox network = {spec.network!r}: must be 'none' or 'gateway'")


def _check_path(path: str) -> None:
    if not path.startswith("/") or "\0" in path or ".." in path.split("/"):
        raise ConfigError(f"sandbox path {path!r}: must be absolute, without '..'")
