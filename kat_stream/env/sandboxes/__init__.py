"""Sandboxes: where agents and graders run, one back end a file behind one protocol (base.py).

Owns the lookup by name. Invariant: a back end is found only through the entry-point group `kat_stream.sandboxes`,
ours like anybody else's.
"""

from __future__ import annotations

from kat_stream.env.plugins import load, names
from kat_stream.env.sandboxes.base import (
    GATEWAY_PORT,
    OUTPUT_LIMIT,
    ExecResult,
    Mount,
    Sandbox,
    SandboxBackend,
    SandboxSpec,
)

GROUP = "kat_stream.sandboxes"

__all__ = [
    "GATEWAY_PORT",
    "OUTPUT_LIMIT",
    "ExecResult",
    "Mount",
    "Sandbox",
    "SandboxBackend",
    "SandboxSpec",
    "available",
    "get_sandbox",
]


def available() -> dict[str, str]:
    """Registered back ends by name, each with the reason why it cannot work on this machine ("" if it can)."""
    return {name: load(GROUP, name).probe() for name in names(GROUP)}


def get_sandbox(name: str, *, allow_unsafe: bool = False) -> SandboxBackend:
    """A new back end of that name; ConfigError if there is none, or if it does not isolate and nobody allowed that."""
    kind = load(GROUP, name)
    backend = kind() if kind.isolated else kind(allow_unsafe=allow_unsafe)
    assert isinstance(backend, SandboxBackend), f"{name} is not a sandbox back end"
    return backend
