"""Files in and out of a sandbox, by tar run inside it.

Owns put, get and read_file for every back end. Invariant: the host never opens a path of the sandbox, so no link,
device or `..` made inside can lead it anywhere; what comes back is bytes, and bounded.
"""

from __future__ import annotations

import asyncio
import shlex
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from kat_stream.env.sandboxes.base import ENVIRONMENT, ExecResult, SandboxSpec
from kat_stream.errors import SandboxError

_TIMEOUT_S = 60.0
_TEXT_LIMIT = 1 << 16  # bytes of messages
# 2023-11-14: always the same, and a date that zip can hold (wheels, jars), which begins with 1980.
_MTIME = 1_700_000_000
_NOT_THERE, _NOT_A_FILE = 44, 45  # exit codes that cat and tar do not use


def pack(files: Mapping[str, tuple[bytes, int]]) -> bytes:
    """{relative path: (content, mode)} as a tar archive; SandboxError for a path that leads out of its directory.

    Blocks for some 30 us a file: not for the event loop where there may be thousands.
    """
    parts: list[bytes] = []
    for path, (content, mode) in files.items():
        if path.startswith("/") or ".." in path.split("/"):
            raise SandboxError(f"path {path!r} leads out of the directory")
        entry = tarfile.TarInfo(path)
        entry.size, entry.mode, entry.mtime = len(content), mode, _MTIME
        head = entry.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
        parts += (head, content, bytes(-len(content) % tarfile.BLOCKSIZE))
    return b"".join((*parts, bytes(2 * tarfile.BLOCKSIZE)))


class FileTransfer(ABC):
    """put, put_tar, get and read_file of the Sandbox protocol, on top of running a command."""

    spec: SandboxSpec
    root: str

    @abstractmethod
    async def _transfer(self, command: Sequence[str], *, timeout_s: float, stdin: bytes, limit: int) -> ExecResult:
        """Run a command of ours, and stop it as soon as it has written more than `limit` bytes."""

    async def put(self, files: Mapping[str, tuple[bytes, int]], directory: str) -> None:
        await self.put_tar(await asyncio.to_thread(pack, files), directory)

    async def put_tar(self, tar: bytes, directory: str) -> None:
        script = '[ -d "$1" ] || mkdir -p -- "$1" && exec tar -x -p --no-same-owner --no-unquote -f - -C "$1"'
        result = await self._script(script, [directory], stdin=tar, limit=_TEXT_LIMIT)
        if result.exit_code != 0:
            raise SandboxError(f"cannot unpack into {directory}: {_reason(result)}")

    async def get(self, paths: Sequence[str] | str, *, limit_bytes: int) -> bytes:
        wanted = [paths] if isinstance(paths, str) else list(paths)
        script = (
            'for p in "$@"; do [ -e "$p" ] || [ -L "$p" ] || { printf %s "$p" >&2; exit 44; }; done; '
            'exec tar -c --hard-dereference --no-unquote --format=pax -f - -- "$@"'
        )
        result = await self._script(script, wanted, limit=limit_bytes)
        self._check(result, ", ".join(wanted), limit_bytes)
        return result.stdout

    async def read_file(self, path: str, limit_bytes: int) -> bytes:
        script = '[ -e "$1" ] || exit 44; [ -f "$1" ] || exit 45; exec cat -- "$1"'
        result = await self._script(script, [path], limit=limit_bytes)
        self._check(result, path, limit_bytes)
        return result.stdout

    async def _script(self, script: str, paths: Sequence[str], *, stdin: bytes = b"", limit: int) -> ExecResult:
        """Run `script` with the paths as arguments, made relative to the root, in which it runs."""
        inside = [str(PurePosixPath(self.spec.workdir) / path).lstrip("/") or "." for path in paths]
        # Not the spec's PATH, which is for the commands of others.
        start = f"PATH={ENVIRONMENT['PATH']}; cd {shlex.quote(self.root or '/')}"
        command = ["/bin/sh", "-c", f"{start}; {script}", "sh", *inside]
        return await self._transfer(command, timeout_s=_TIMEOUT_S, stdin=stdin, limit=limit)

    def _check(self, result: ExecResult, what: str, limit_bytes: int) -> None:
        if result.truncated:
            raise SandboxError(f"{what}: larger than {limit_bytes} bytes")
        if result.exit_code == _NOT_THERE:
            raise FileNotFoundError(f"{what}: no such file in the sandbox")
        if result.exit_code == _NOT_A_FILE:
            raise SandboxError(f"{what}: not a regular file")
        if result.exit_code != 0:
            raise SandboxError(f"cannot read {what}: {_reason(result)}")


def _reason(result: ExecResult) -> str:
    text = result.stderr.decode(errors="replace").strip()[-500:]
    return shlex.quote(text) if text else f"{'timed out' if result.timed_out else f'exit code {result.exit_code}'}"
