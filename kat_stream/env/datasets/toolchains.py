"""Language tool chains of the worker that a sandbox may see, read-only.

Owns the translation of a symbolic mount source (`toolchain:python`) to a path on this worker. Invariant: a Task record
never holds a path of the machine it was made on, so a worker elsewhere finds its own or says what is missing.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

from kat_stream.errors import TaskError

PREFIX = "toolchain:"
_ASK_TIMEOUT_S = 20.0
# What the JavaScript exercises of the polyglot benchmark are tested with, by their package.json.
_JEST = (
    *("jest@29.7.0", "babel-jest@29.7.0", "@babel/core@7.25.2", "core-js@3.37.1"),
    "@exercism/babel-preset-javascript@0.2.1",
)
# And the Java ones, by their build.gradle: two of them use JSON and RxJava.
_JUNIT = (
    *("org.junit.platform:junit-platform-console-standalone:1.10.0", "org.assertj:assertj-core:3.25.1"),
    *("net.bytebuddy:byte-buddy:1.14.11", "org.json:json:20190722"),
    *("io.reactivex.rxjava2:rxjava:2.2.12", "org.reactivestreams:reactive-streams:1.0.3"),
)


def resolve(mounts: Mapping[str, str]) -> dict[str, str]:
    """Mounts with symbolic sources made real: path inside -> path on the worker; TaskError if one is not here."""
    return {inside: _source(source) for inside, source in mounts.items()}


def _source(source: str) -> str:
    if not source.startswith(PREFIX):
        return source
    name = source.removeprefix(PREFIX)
    if name not in _FINDERS:
        raise TaskError(f"no tool chain {name!r} (known: {', '.join(sorted(_FINDERS))})")
    return str(_found(name))


@cache
def _found(name: str) -> Path:
    path = _FINDERS[name]()
    if not path.is_dir():
        raise TaskError(f"tool chain {name!r}: {path} is not on this machine")
    return path


def _python() -> Path:
    return Path(sys.base_prefix)


def _pytest() -> Path:
    """The site-packages directory that holds pytest."""
    spec = importlib.util.find_spec("pytest")
    if spec is None or spec.origin is None:
        raise TaskError("tool chain 'pytest': pytest is not installed beside kat-stream")
    return Path(spec.origin).parent.parent


def _go() -> Path:
    return Path(_ask("go", "env", "GOROOT"))


def _rust() -> Path:
    return Path(_ask("rustc", "--print", "sysroot"))


def _boost() -> Path:
    """Where the system has it, and where CMake looks for it."""
    return Path("/usr/include/boost")


def _node() -> Path:
    """The directory that holds `node`."""
    program = shutil.which("node")
    if program is None:
        raise TaskError("tool chain: 'node' is not on this machine")
    return Path(program).resolve().parent


def _jest() -> Path:
    cache = _installed("jest")
    if not (cache / "node_modules").is_dir():
        raise TaskError(f"tool chain 'jest': run npm install --ignore-scripts --prefix {cache} {' '.join(_JEST)}")
    return cache / "node_modules"


def _jdk() -> Path:
    """The directory of the JDK that `javac` is of."""
    program = shutil.which("javac")
    if program is None:
        raise TaskError("tool chain: 'javac' is not on this machine; install a JDK, 17 or newer")
    return Path(program).resolve().parent.parent


def _junit() -> Path:
    cache = _installed("junit")
    names = ["-".join(jar.split(":")[1:]) + ".jar" for jar in _JUNIT]
    if missing := [jar for jar, name in zip(_JUNIT, names, strict=True) if not (cache / name).is_file()]:
        copy = f"mvn -q dependency:copy -DoutputDirectory={cache} -Dartifact=$jar"
        raise TaskError(f"tool chain 'junit': run for jar in {' '.join(missing)}; do {copy}; done")
    return cache


def _installed(name: str) -> Path:
    """Where somebody has to put what is downloaded once a machine."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "kat-stream" / "toolchains" / name


def _ask(*command: str) -> str:
    if shutil.which(command[0]) is None:
        raise TaskError(f"tool chain: {command[0]!r} is not on this machine")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ASK_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise TaskError(f"tool chain: {' '.join(command)}: {error}") from error
    return done.stdout.strip()


_FINDERS: dict[str, Callable[[], Path]] = {
    "python": _python,
    "pytest": _pytest,
    "go": _go,
    "rust": _rust,
    "boost": _boost,
    "node": _node,
    "jest": _jest,
    "jdk": _jdk,
    "junit": _junit,
}
