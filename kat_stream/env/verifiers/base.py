"""What a verifier is: hidden tests and a sandbox that holds the finished work tree, in; a verdict, out.

Owns the protocol. Invariant: a Verdict speaks about the work only; whatever keeps the verifier from judging is a
VerifierError (or the sandbox's own error), so that an infrastructure failure is never a score.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Protocol

from kat_stream.env.datasets import Files
from kat_stream.env.plugins import load
from kat_stream.env.sandboxes.base import Sandbox
from kat_stream.errors import ConfigError
from topics import Task

GROUP = "kat_stream.verifiers"
_EVIDENCE_CHARS = 2000


@dataclass(frozen=True)
class Verdict:
    """`score` is in the task's own unit, by convention 0 (nothing) to 1 (all)."""

    score: float
    components: dict[str, float] = field(default_factory=dict)
    evidence: str = ""


class Verifier(Protocol):
    """One way of grading. `version` changes whenever the same work could get another score."""

    name: str
    version: str

    async def grade(self, task: Task, tests: Files, sandbox: Sandbox) -> Verdict:
        """Judge the work tree in `sandbox`; VerifierError if that is not possible.

        SandboxError if the sandbox, as it was left, does not allow it: where an agent left it so, that is its score 0.
        """
        ...


@cache
def get_verifier(name: str) -> Verifier:
    """The verifier registered as `name`; ConfigError if there is none, or it is none."""
    kind = load(GROUP, name)
    try:
        verifier: Verifier = kind()
    except TypeError as error:
        raise ConfigError(f"{GROUP}: {name!r} is no class that is called without arguments: {error}") from error
    if missing := [word for word in ("name", "version", "grade") if not hasattr(verifier, word)]:
        raise ConfigError(f"{GROUP}: {name!r} has no {', '.join(missing)}")
    return verifier


def tail(output: bytes) -> str:
    """The end of an output as evidence, at most 2,000 characters; bytes that are not UTF-8 become U+FFFD."""
    return output.decode("utf-8", errors="replace")[-_EVIDENCE_CHARS:]
