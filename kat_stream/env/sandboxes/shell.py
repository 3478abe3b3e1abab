"""The command server: a POSIX shell that is process 1 of the sandbox and runs one command after the other.

Owns the conversation with it. A command is one line of script on its standard input, its output goes through two
named pipes made for this command alone, and the shell answers with a secret word and the exit code. Invariants: a
command ends at the answer, whoever still holds its pipes; a process inside cannot forge the answer, because the
shell is not readable for it (stage.py) and no command inherits the shell's own pipes; process 1 cannot be killed
from inside.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kat_stream.env.sandboxes.output import OutputPipe
from kat_stream.errors import ConfigError, SandboxDied

_CHUNK = 1 << 16
_LINE_LIMIT = 48 << 10  # bytes of script that surely fit into an empty pipe, so that writing never blocks
_NOISE_LIMIT = 4096  # bytes of other output (errors of bwrap, of the shell itself) kept for the message
_FILE_MODE = 0o644
_PIPE_MODE = 0o622


@dataclass(frozen=True)
class Exchange:
    """One command as the shell sees it; paths are those inside, `name` is unique in the sandbox."""

    name: str
    script: str
    stdin: bytes
    merge_stderr: bool
    limit: int
    when_full: Callable[[], object] | None = None


@dataclass(frozen=True)
class Output:
    stdout: bytes
    stderr: bytes
    truncated: bool


def script_of(command: str | Sequence[str], env: Mapping[str, str]) -> tuple[str, str]:
    """(exports, the command as shell text that replaces the shell); ConfigError for what no command line can hold."""
    words = [command] if isinstance(command, str) else list(command)
    if not words or any("\0" in word for word in words):
        raise ConfigError("a command needs at least one word and no NUL bytes")
    exports = "".join(f"export {name}={shlex.quote(value)}; " for name, value in env.items())
    return exports, command if isinstance(command, str) else f"exec {shlex.join(words)}"


class ShellServer:
    """Speaks to a shell started with pipes for standard input and output (errors merged into the output).

    `directory` is the host's side of `inside`, a directory that the shell sees read-only and nobody else sees.
    """

    def __init__(self, process: subprocess.Popen[bytes], directory: Path, inside: str) -> None:
        assert process.stdin is not None and process.stdout is not None
        self._loop = asyncio.get_running_loop()
        self._input, self._output = process.stdin.fileno(), process.stdout.fileno()
        # Text: Python 3.12 keeps every part of every Path for ever, and each command has files of new names.
        self._directory, self._inside = str(directory), inside
        self._word = secrets.token_hex(16).encode()
        self._pending: asyncio.Future[int] | None = None
        self._buffer = bytearray()
        self._noise = bytearray()
        self._pipes: list[OutputPipe] = []
        self.died_of = ""
        os.set_blocking(self._output, False)
        self._loop.add_reader(self._output, self._readable)

    @property
    def noise(self) -> str:
        """What came that was no answer."""
        return self._noise.decode(errors="replace").strip()

    def ask(self, line: str) -> asyncio.Future[int]:
        """Send one line of script; the future gives its exit code, or SandboxDied."""
        assert self._pending is None or self._pending.done(), "one command at a time"
        self._pending = self._loop.create_future()
        text = f"{line}\nprintf '\\n%s %d\\n' {self._word.decode()} \"$?\"\n"
        try:
            os.write(self._input, text.encode(errors="surrogateescape"))
        except OSError:
            self.close("its command server is gone")
        if self.died_of and not self._pending.done():
            self._pending.set_exception(SandboxDied(self.died_of))
        return self._pending

    def start(self, exchange: Exchange) -> tuple[asyncio.Future[int], Callable[[], Output]]:
        """Start a command; the function takes its output and cleans up, and must be called."""
        out = self._make_pipe(f"{exchange.name}.out", exchange)
        err = None if exchange.merge_stderr else self._make_pipe(f"{exchange.name}.err", exchange)
        source = self._make_file(f"{exchange.name}.in", exchange.stdin) if exchange.stdin else "/dev/null"
        errors = "2>&1" if err is None else f"2>{self._inside}/{exchange.name}.err"
        line = f"jobs; ( {exchange.script} ) <{source} >{self._inside}/{exchange.name}.out {errors}"
        return self.ask(line), lambda: self._collect(exchange.name, out, err)

    def program(self, name: str, command: str | Sequence[str], env: Mapping[str, str]) -> str:
        """Script for a command; one that is too long for the pipe or for one argument goes through a file."""
        exports, text = script_of(command, env)
        if len((exports + text).encode(errors="surrogateescape")) <= _LINE_LIMIT // 2:
            return exports + (f"exec /bin/sh -c {shlex.quote(text)}" if isinstance(command, str) else text)
        content = f"{exports}\n{text}\n".encode(errors="surrogateescape")
        return f"exec /bin/sh {self._make_file(f'{name}.sh', content)}"

    def reap(self) -> None:
        """Have the idle shell collect the dead whose parents are gone; `jobs` does that without a process of its own.

        Each of them takes a place in the process table, and a shell that finds it full when it starts a command ends.
        """
        with suppress(OSError):  # it has ended, which the next command says
            os.write(self._input, b"jobs\n")

    def check_alive(self) -> None:
        """SandboxDied if the conversation is over."""
        if self.died_of:
            raise SandboxDied(self.died_of)

    def close(self, reason: str) -> None:
        """Stop listening; a command that runs ends with SandboxDied(reason)."""
        if self.died_of:
            return
        self.died_of = reason
        self._loop.remove_reader(self._output)
        for pipe in self._pipes:
            pipe.close()
        if self._pending is not None and not self._pending.done():
            self._pending.set_exception(SandboxDied(reason))
            self._pending.exception()  # whoever waits sees it; nobody waiting is no news

    def _readable(self) -> None:
        data = b""
        with suppress(BlockingIOError):
            data = os.read(self._output, _CHUNK)
            if not data:
                self.close(f"the sandbox ended by itself {self.noise}".strip())
        *lines, rest = (self._buffer + data).split(b"\n")
        self._buffer = bytearray(rest[-_NOISE_LIMIT:])
        for line in lines:
            self._answer(bytes(line))

    def _answer(self, line: bytes) -> None:
        word, _, code = line.partition(b" ")
        if word == self._word and self._pending is not None and not self._pending.done():
            self._pending.set_result(int(code))
        elif line:
            self._noise = bytearray((self._noise + b"\n" + line)[-_NOISE_LIMIT:])

    def _make_pipe(self, name: str, exchange: Exchange) -> OutputPipe:
        path = f"{self._directory}/{name}"
        os.mkfifo(path)
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        os.fchmod(handle, _PIPE_MODE)
        pipe = OutputPipe(handle, exchange.limit, exchange.when_full)
        self._pipes = [p for p in self._pipes if p.open] + [pipe]
        return pipe

    def _make_file(self, name: str, content: bytes) -> str:
        handle = os.open(f"{self._directory}/{name}", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC)
        with os.fdopen(handle, "wb") as file:
            os.fchmod(handle, _FILE_MODE)
            file.write(content)
        return f"{self._inside}/{name}"

    def _collect(self, name: str, out: OutputPipe, err: OutputPipe | None) -> Output:
        for suffix in ("out", "err", "in", "sh"):
            with suppress(FileNotFoundError):
                os.unlink(f"{self._directory}/{name}.{suffix}")  # noqa: PTH108 - see __init__
        pipes = [out] if err is None else [out, err]
        texts = [pipe.finish() for pipe in pipes]
        return Output(texts[0], texts[1] if err else b"", any(pipe.truncated for pipe in pipes))
