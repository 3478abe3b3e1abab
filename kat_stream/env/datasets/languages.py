"""How each language of the polyglot benchmark is tested: command, tool chain and limits. Data only.

Owns that table. Invariant: build products and caches go to /tmp, never into the work tree, so that a patch holds source
only and a grading never meets a product of the agent's own build. Source of the commands: research/benchmarks.md 4.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Language:
    """`mounts` maps a path inside the sandbox to a tool chain; memory and disk in MiB, time in seconds.

    Time is generous: a test that runs out of it scores 0, and a busy worker is no reason for that.
    """

    command: str
    mounts: dict[str, str] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    ignore: str = ""
    """Content of the work tree's .gitignore: what a test run leaves behind."""
    held_back: str = ""
    """What of a test file makes tests wait for those before them, as a pattern: it is taken out."""
    memory_mb: int = 512
    disk_mb: int = 64
    """Of the work tree and of /tmp each; what lies there counts as memory too."""
    cpus: float = 1.0
    timeout_s: float = 180.0


_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

LANGUAGES: dict[str, Language] = {
    "python": Language(
        command="python3 -m pytest -q -p no:cacheprovider",
        mounts={"/opt/python": "toolchain:python", "/opt/pytest": "toolchain:pytest"},
        env={
            "PATH": f"/opt/python/bin:{_PATH}",
            # An interpreter that was built with a shared library looks for it where it was installed.
            "LD_LIBRARY_PATH": "/opt/python/lib",
            "PYTHONPATH": "/opt/pytest",
            "PYTHONDONTWRITEBYTECODE": "1",
            # Plug-ins of the worker's own environment are no part of the benchmark.
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        },
        ignore="__pycache__/\n.pytest_cache/\n",
    ),
    "go": Language(
        command="go test ./...",
        mounts={"/opt/go": "toolchain:go"},
        env={
            "PATH": f"/opt/go/bin:{_PATH}",
            "GOROOT": "/opt/go",
            "GOPROXY": "off",
            "GOTOOLCHAIN": "local",
            "GOCACHE": "/tmp/go-cache",
            "GOPATH": "/tmp/go",
            "CGO_ENABLED": "0",
        },
        memory_mb=3072,
        disk_mb=1024,
        cpus=2.0,
        timeout_s=600.0,
    ),
    "rust": Language(
        command="cargo test --offline -- --include-ignored",
        mounts={"/opt/rust": "toolchain:rust"},
        env={"PATH": f"/opt/rust/bin:{_PATH}", "CARGO_HOME": "/tmp/cargo", "CARGO_TARGET_DIR": "/tmp/target"},
        ignore="target/\n",
        memory_mb=2048,
        disk_mb=512,
        cpus=2.0,
        timeout_s=600.0,
    ),
    "javascript": Language(
        command="node /work/node_modules/jest/bin/jest.js --ci",
        # Node looks for packages in every directory above that of the exercise.
        mounts={"/opt/node": "toolchain:node", "/work/node_modules": "toolchain:jest"},
        env={"PATH": f"/opt/node:{_PATH}"},
        held_back=r"\bx(?=(test|it|describe)\()",
        memory_mb=2048,
        cpus=2.0,
    ),
    "java": Language(
        command=(
            "javac -d /tmp/classes -cp '/opt/junit/*' $(find src -name '*.java')"
            " && java -Xmx1g -XX:+UseSerialGC -cp '/tmp/classes:/opt/junit/*'"
            " org.junit.platform.console.ConsoleLauncher execute --scan-classpath /tmp/classes --fail-if-no-tests"
            " --disable-banner"
        ),
        mounts={"/opt/jdk": "toolchain:jdk", "/opt/junit": "toolchain:junit"},
        env={"PATH": f"/opt/jdk/bin:{_PATH}"},
        held_back=r'@Disabled\("Remove to run test"\)',
        memory_mb=2048,
        cpus=2.0,
    ),
    "cpp": Language(
        command="cmake -S . -B /tmp/build -DEXERCISM_RUN_ALL_TESTS=1 && cmake --build /tmp/build",
        ignore="build/\n",
        memory_mb=2048,
        disk_mb=512,
        cpus=2.0,
        timeout_s=600.0,
    ),
}
