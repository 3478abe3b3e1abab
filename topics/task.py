"""`tasks`: one problem an agent can be set. Written by a task producer; read by the sampler and by people.

A task is the report's five-tuple: environment, tools, scaffold, instruction, verifier.
"""

from __future__ import annotations

import msgspec

from topics.record import Record


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    """Where the agent works. `files` is `dataset-spec#task-id`: any process can open it and have the files."""

    files: str
    workdir: str = "/work"
    env: dict[str, str] = {}
    cpus: float = 1.0
    memory_mb: int = 512
    disk_mb: int = 64
    pids: int = 128
    mounts: dict[str, str] = {}
    """Read-only directories: path inside the sandbox -> path on the worker."""


class VerifierSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How the result is graded. `tests` names a directory that is put into the grading sandbox only."""

    name: str
    tests: str = ""
    timeout_s: float = 60.0
    in_place: bool = False
    """Grade the agent's own sandbox instead of a second, clean one to which the patch is applied."""
    command: str = ""
    options: dict[str, str] = {}


class Task(Record, frozen=True, kw_only=True, tag="Task/1"):
    task_id: str
    dataset: str
    environment: Environment
    tools: tuple[str, ...] = ()
    scaffold: str = "shell"
    instruction: str
    verifier: VerifierSpec
    solution: str = ""
    """A directory or file with the reference solution, for the oracle agent; empty if there is none."""
    agent_timeout_s: float = 600.0
    metadata: dict[str, str] = {}
