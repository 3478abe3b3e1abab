"""Runs any unmodified agent program inside the sandbox, described by a data file.

Owns the one runner of black boxes. Invariant: the program knows a base URL on its own loopback and a key, nothing else;
what it is, how it is started and how its end is read stands in its TOML file, not here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit

import msgspec

from kat_stream.env.datasets.toolchains import resolve
from kat_stream.env.sandboxes.base import GATEWAY_PORT, ExecResult, Sandbox
from kat_stream.env.scaffolds.base import Limits, Needs, ScaffoldResult, SessionEndpoint, log_tail
from kat_stream.env.scaffolds.install import install, installed
from kat_stream.env.scaffolds.relay import relay
from kat_stream.errors import ConfigError, SandboxDied, SandboxError
from topics import Task
from topics.trajectory import Outcome

_AGENT = "/opt/agent"
_HOME = "/tmp/.agent"
# The end of the log is what tells why an agent gave up; a long log must not cut it off.
_SCRIPT = f'mkdir -p {_HOME}; "$@" >{_HOME}/log 2>&1 </dev/null; code=$?; tail -c 4000 {_HOME}/log; exit $code'
_OUTPUT_LIMIT = 1 << 14
_OUTCOME_LIMIT = 1 << 24
# The runner's own clock fires first only if the sandbox does not keep this one.
_MARGIN_S = 2.0
_PLACEHOLDER = re.compile(r"\{(\w+)\}")


class _Install(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    packages: tuple[str, ...]


class _Run(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    command: tuple[str, ...]
    env: dict[str, str] = {}
    files: dict[str, str] = {}
    """Absolute path inside the sandbox -> content; placeholders are filled in."""


class _Needs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    memory_mb: int
    pids: int


class _Outcome(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the program says how it ended: a JSON file, a dotted field in it, and what its values mean."""

    file: str
    field: str
    values: dict[str, str]


class Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A black-box agent as data."""

    name: str
    version: str
    install: _Install
    run: _Run
    needs: _Needs
    outcome: _Outcome


def read_description(path: Path) -> Description:
    """Read and check an agent's TOML file; ConfigError names the file and the key."""
    try:
        description = msgspec.toml.decode(path.read_bytes(), type=Description)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    for value in description.outcome.values.values():
        if value not in get_args(Outcome):
            raise ConfigError(f"{path}: outcome.values: {value!r} is not one of {', '.join(get_args(Outcome))}")
    return description


class BlackBox:
    """One described agent."""

    def __init__(self, description: Description) -> None:
        self.name = description.name
        self._is = description

    def install(self) -> Path:
        """Install the program on this worker (a no-op if it is there); ConfigError if that fails."""
        return install(self.name, self._is.version, self._is.install.packages)

    def needs(self) -> Needs:
        agent = installed(self.name, self._is.version)
        mounts = {_AGENT: str(agent), **resolve({"/opt/python": "toolchain:python"})}
        return Needs(network=True, memory_mb=self._is.needs.memory_mb, pids=self._is.needs.pids, mounts=mounts)

    async def run(self, task: Task, session: SessionEndpoint, sandbox: Sandbox, limits: Limits) -> ScaffoldResult:
        listener = await sandbox.listen(GATEWAY_PORT)
        values = {
            "base_url": f"{sandbox.base_url(GATEWAY_PORT)}{urlsplit(session.base_url).path}/v1",
            "key": session.key,
            "instruction": task.instruction,
            "max_turns": str(limits.max_turns),
            "agent": _AGENT,
        }
        async with relay(listener, session.base_url):
            await self._write_files(sandbox, values)
            done = await sandbox.exec(
                ["sh", "-c", _SCRIPT, self.name, *(_fill(word, values) for word in self._is.run.command)],
                timeout_s=max(limits.seconds - _MARGIN_S, 1.0),
                env={name: _fill(value, values) for name, value in self._is.run.env.items()},
                output_limit=_OUTPUT_LIMIT,
            )
        if done.timed_out:
            return ScaffoldResult("time_limit", f"not done after {limits.seconds:.0f} s", log_tail(done.stdout))
        return await self._ending(sandbox, done)

    async def close(self) -> None:
        pass

    async def _write_files(self, sandbox: Sandbox, values: Mapping[str, str]) -> None:
        for path, content in self._is.run.files.items():
            directory, _, name = path.rpartition("/")
            await sandbox.put({name: (_fill(content, values).encode(), 0o644)}, directory or "/")

    async def _ending(self, sandbox: Sandbox, done: ExecResult) -> ScaffoldResult:
        """What the program's own record says; agent_error if it left none or none that is known."""
        log = log_tail(done.stdout)
        rule = self._is.outcome
        said = await self._said(sandbox, rule)
        for value, outcome in rule.values.items():
            if said == value:
                return ScaffoldResult(_outcome(outcome), "" if outcome == "submitted" else said, log)
        return ScaffoldResult("agent_error", f"ended with {said or 'no record'!r} and exit code {done.exit_code}", log)

    async def _said(self, sandbox: Sandbox, rule: _Outcome) -> str:
        try:
            value: Any = msgspec.json.decode(await sandbox.read_file(rule.file, _OUTCOME_LIMIT))
        except SandboxDied:
            raise
        except (SandboxError, FileNotFoundError, msgspec.DecodeError):
            # The agent may have deleted or broken it: then it has not said how it ended.
            return ""
        for key in rule.field.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value if isinstance(value, str) else ""


def _outcome(text: str) -> Outcome:
    return next(outcome for outcome in get_args(Outcome) if outcome == text)


def _fill(text: str, values: Mapping[str, str]) -> str:
    """Replace {name} for the known names, once each: braces of the program's own syntax or of a value stay."""
    return _PLACEHOLDER.sub(lambda found: values.get(found[1], found[0]), text)
