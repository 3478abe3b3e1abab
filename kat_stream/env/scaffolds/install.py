"""Installs the programs of black-box agents, once a machine, into the user's cache.

Owns ~/.cache/kat-stream/agents (XDG_CACHE_HOME is honoured). Invariant: a directory NAME-VERSION is complete or absent:
it is made beside its place and renamed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from kat_stream.errors import ConfigError

_TIMEOUT_S = 900.0


def agents_directory() -> Path:
    """Where agents lie; may not exist yet."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "kat-stream" / "agents"


def installed(name: str, version: str) -> Path:
    """The directory of an installed agent; ConfigError that says how to install it."""
    path = agents_directory() / f"{name}-{version}"
    if not path.is_dir():
        raise ConfigError(f"agent {name} {version} is not installed; run: kat-stream scaffolds install {name}")
    return path


def install(name: str, version: str, packages: Sequence[str]) -> Path:
    """Install Python packages (pip requirements) into NAME-VERSION and return it; ConfigError if that fails.

    The result is a plain directory for `sys.path`, not a virtual environment: it has no absolute path in it and works
    wherever a sandbox mounts it. Byte code is compiled here, since a sandbox sees it read-only.
    """
    target = agents_directory() / f"{name}-{version}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        made = Path(scratch) / "packages"
        _run([*_installer(), "--target", str(made), *packages], name)
        _run([sys.executable, "-m", "compileall", "-q", "-j", "0", str(made)], name, may_fail=True)
        _place(made, target)
    return target


def _installer() -> list[str]:
    beside = Path(sys.executable).with_name("uv")
    uv = str(beside) if beside.exists() else shutil.which("uv")
    if uv:
        return [uv, "pip", "install", "--quiet", "--python", sys.executable]
    return [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]


def _run(command: list[str], name: str, *, may_fail: bool = False) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"installing agent {name}: {error}") from error
    # Packages ship templates that are no valid Python; compiling reports them, and they are never imported.
    if done.returncode != 0 and not may_fail:
        raise ConfigError(f"installing agent {name}: {' '.join(command[:4])}: {done.stderr.strip()[-1000:]}")


def _place(made: Path, target: Path) -> None:
    try:
        made.rename(target)
    except OSError as error:
        # Two installations at once: whoever came first has placed the same thing.
        if not target.is_dir():
            raise ConfigError(f"{target}: {error}") from error
