"""What a scaffold is: a task, a session endpoint and a sandbox in; how it ended out.

Owns the protocol. Invariant: `run` returns for whatever the agent does (an outcome of its own) and raises for whatever
our side does wrong (GatewayError, SandboxError, ConfigError): the rollout tells the two apart by that alone. The one
exception is SandboxDied: while an agent works, a sandbox that goes away is the agent's doing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from kat_stream.env.sandboxes.base import Sandbox
from topics import Task
from topics.trajectory import Outcome

GROUP = "kat_stream.scaffolds"
LOG_CHARS = 4000


@dataclass(frozen=True)
class SessionEndpoint:
    """Where the agent's model is: `base_url` is http://host:port/s/SESSION without `/v1`; `key` goes as Bearer."""

    base_url: str
    key: str


@dataclass(frozen=True)
class Limits:
    """What one rollout may use: turns, tokens, and seconds until its time is up."""

    max_turns: int
    max_new_tokens: int
    max_context: int
    seconds: float


@dataclass(frozen=True)
class ScaffoldResult:
    """How the agent ended; `log` is the tail of its own output."""

    outcome: Outcome
    detail: str = ""
    log: str = ""


@dataclass(frozen=True)
class Needs:
    """What the agent needs of the world: a model session, the gateway inside the sandbox, directories of its own."""

    session: bool = True
    network: bool = False
    memory_mb: int = 0
    pids: int = 0
    disk_mb: int = 0
    writable: tuple[str, ...] = ()
    mounts: dict[str, str] = field(default_factory=dict)
    """Path inside the sandbox -> path on the worker."""


class Scaffold(Protocol):
    """One agent. An instance serves many rollouts at once."""

    name: str

    def needs(self) -> Needs:
        """ConfigError if the agent is not installed on this worker."""
        ...

    async def run(self, task: Task, session: SessionEndpoint, sandbox: Sandbox, limits: Limits) -> ScaffoldResult:
        """Let the agent work until it ends; the caller's deadline cancels it."""
        ...

    async def close(self) -> None:
        """Release what the instance holds (connections); idempotent."""
        ...


def log_tail(output: bytes) -> str:
    """The end of an agent's output for the record; bytes that are not UTF-8 become U+FFFD."""
    return output.decode("utf-8", errors="replace")[-LOG_CHARS:]
