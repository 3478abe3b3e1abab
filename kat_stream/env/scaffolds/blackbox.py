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
from kat_stream.env.scaffolds.description import Description, Ending, read_description
from kat_stream.env.scaffolds.install import install_npm, install_python, installed, installed_node
from kat_stream.env.scaffolds.relay import relay
from kat_stream.errors import SandboxDied, SandboxError
from topics import Task
from topics.trajectory import Outcome

__all__ = ["BlackBox", "Description", "read_description"]

MODEL = "policy"
_AGENT = "/opt/agent"
_NODE = "/opt/node"
_HOME = "/tmp/.agent"
# The end of the log is what tells why an agent gave up; a long log must not cut it off. What an agent leaves running in
# the background has the pipe no more.
_SCRIPT = f'mkdir -p {_HOME}; "$@" >{_HOME}/log 2>&1; code=$?; tail -c 16000 {_HOME}/log; exit $code'
_OUTPUT_LIMIT = 1 << 14
_OUTCOME_LIMIT = 1 << 24
# Of how a program says it ended. The agent can write that record, too.
_SAID_CHARS = 200
# The runner's own clock fires first only if the sandbox does not keep this one.
_MARGIN_S = 2.0
_PLACEHOLDER = re.compile(r"\{(\w+)\}")


class BlackBox:
    """One described agent. `lock`: the file with the hashes of its packages."""

    def __init__(self, description: Description, lock: Path | None = None) -> None:
        self.name = description.name
        self.description = description
        self._lock = lock

    def install(self) -> Path:
        """Install the program on this worker (a no-op if it is there); ConfigError if that fails."""
        what = self.description
        if what.install.kind == "npm":
            return install_npm(self.name, what.version, what.packages(), what.install.node, self._lock)
        return install_python(self.name, what.version, what.packages(), self._lock, what.install.git)

    def needs(self) -> Needs:
        what = self.description
        mounts = {_AGENT: str(installed(self.name, what.version))}
        if what.install.kind == "python":
            mounts |= resolve({"/opt/python": "toolchain:python"})
        if what.install.node:
            mounts[_NODE] = str(installed_node(what.install.node))
        return Needs(
            network=True,
            memory_mb=what.needs.memory_mb,
            pids=what.needs.pids,
            disk_mb=what.needs.disk_mb,
            writable=what.needs.writable,
            mounts=mounts,
        )

    async def run(self, task: Task, session: SessionEndpoint, sandbox: Sandbox, limits: Limits) -> ScaffoldResult:
        listener = await sandbox.listen(GATEWAY_PORT)
        what = self.description.run
        root_url = sandbox.base_url(GATEWAY_PORT) + urlsplit(session.base_url).path
        values = {
            "root_url": root_url,
            "base_url": f"{root_url}/v1",
            "key": session.key,
            "model": MODEL,
            "instruction": task.instruction,
            "max_turns": str(limits.max_turns),
            "max_context": str(limits.max_context),
            "max_new_tokens": str(limits.max_new_tokens),
            "seconds": f"{limits.seconds:.0f}",
            "agent": _AGENT,
            "workdir": task.environment.workdir,
        }
        async with relay(listener, session.base_url):
            await self._write_files(sandbox, values)
            done = await sandbox.exec(
                ["sh", "-c", _SCRIPT, self.name, *(_fill(word, values) for word in what.command)],
                timeout_s=max(limits.seconds - _MARGIN_S, 1.0),
                stdin=_fill(what.stdin, values).encode(),
                env={name: _fill(value, values) for name, value in what.env.items()},
                output_limit=_OUTPUT_LIMIT,
            )
        if done.timed_out:
            return ScaffoldResult("time_limit", f"not done after {limits.seconds:.0f} s", log_tail(done.stdout))
        return await self._ending(sandbox, done)

    async def close(self) -> None:
        pass

    async def _write_files(self, sandbox: Sandbox, values: Mapping[str, str]) -> None:
        for path, content in self.description.run.files.items():
            directory, _, name = path.rpartition("/")
            await sandbox.put({name: (_fill(content, values).encode(), 0o644)}, directory or "/")

    async def _ending(self, sandbox: Sandbox, done: ExecResult) -> ScaffoldResult:
        """What the program itself says, in its record, its output, its exit code; agent_error if it says nothing."""
        rule, log = self.description.outcome, log_tail(done.stdout)
        said = await _said(sandbox, rule) if rule.file else ""
        outcome = rule.values.get(said) or _logged(rule, done.stdout.decode("utf-8", errors="replace"))
        outcome = outcome or rule.exit.get(str(done.exit_code), "")
        if not outcome:
            why = f"ended with {said or 'no record'!r} and" if rule.file else "ended with"
            return ScaffoldResult("agent_error", f"{why} exit code {done.exit_code}", log)
        return ScaffoldResult(_outcome(outcome), "" if outcome == "submitted" else said, log)


async def _said(sandbox: Sandbox, rule: Ending) -> str:
    try:
        value: Any = msgspec.json.decode(await sandbox.read_file(rule.file, _OUTCOME_LIMIT))
    except SandboxDied:
        raise
    except (SandboxError, FileNotFoundError, msgspec.DecodeError, RecursionError):
        # The agent may have deleted or broken it, or nested it beyond all measure: then it has not said how it ended.
        return ""
    for key in rule.field.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value[:_SAID_CHARS] if isinstance(value, str) else ""


def _logged(rule: Ending, log: str) -> str:
    return next((outcome for pattern, outcome in rule.log.items() if re.search(pattern, log)), "")


def _outcome(text: str) -> Outcome:
    return next(outcome for outcome in get_args(Outcome) if outcome == text)


def _fill(text: str, values: Mapping[str, str]) -> str:
    """Replace {name} for the known names, once each: braces of the program's own syntax or of a value stay."""
    return _PLACEHOLDER.sub(lambda found: values.get(found[1], found[0]), text)
