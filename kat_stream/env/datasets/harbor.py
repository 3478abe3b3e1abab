"""Directories of Harbor / Terminal-Bench 2 tasks that need no image build.

Owns the reading of task.toml, instruction.md, environment/, tests/ and solution/. Invariant: a directory either gives a
complete Task or a TaskError that names the file and the reason. Source of the format: research/benchmarks.md 2.
"""

from __future__ import annotations

import posixpath
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kat_stream.env.datasets.base import Files, Spec, read_text, read_tree, usable
from kat_stream.env.datasets.dockerfile import Image, read_dockerfile
from kat_stream.errors import TaskError
from topics import Environment, Task, VerifierSpec

_DEFAULT_WORKDIR = "/app"
_UNITS_MB = {"": 1 / (1 << 20), "K": 1 / 1024, "M": 1, "G": 1024, "T": 1024 * 1024}
_PIDS = 256
# The verifier makes these empty before it puts the tests in.
_CLEARED = ("/tests/", "/logs/verifier/")


class HarborDataset:
    """`harbor:PATH`: PATH is one task directory or a directory of them."""

    name = "harbor"

    def __init__(self, spec: Spec) -> None:
        spec.check_options(())
        self._root = spec.directory()
        self._spec = spec
        single = (self._root / "task.toml").exists()
        self._paths = [self._root] if single else sorted(path for path in self._root.iterdir() if path.is_dir())

    def scan(self) -> Iterator[Task | TaskError]:
        for path in self._paths:
            try:
                yield self._task(path)
            except TaskError as error:
                yield error

    def tasks(self, limit: int | None = None) -> list[Task]:
        return usable(self.scan(), limit)

    def files(self, task: Task) -> Files:
        image = _image(self._path(task), task.environment.workdir)
        return _inside(image, task.environment.workdir, self._path(task))

    def tests(self, task: Task) -> Files:
        return _tests(self._path(task))

    def solution(self, task: Task) -> Files:
        return _solution(self._path(task))

    def _path(self, task: Task) -> Path:
        for path in self._paths:
            if path.name == task.task_id:
                return path
        raise TaskError(f"{self._root}: no task {task.task_id!r}")

    def _task(self, path: Path) -> Task:
        config = _Config(path / "task.toml")
        instruction = read_text(path / "instruction.md")
        if "test.sh" not in _tests(path):
            raise TaskError(f"{path / 'tests' / 'test.sh'}: missing; a task without tests cannot be graded")
        image = _image(path, "")
        reference = self._spec.reference(path.name)
        workdir = image.workdir if image.workdir != "/" else _DEFAULT_WORKDIR
        _inside(image, workdir, path)
        if f"{workdir}/".startswith(_CLEARED):
            raise TaskError(f"{path}: the work directory {workdir} is one that the tests have for themselves")
        return Task(
            run="",
            task_id=path.name,
            dataset=self.name,
            environment=_environment(config, reference, workdir, image.env),
            instruction=instruction.strip(),
            verifier=VerifierSpec(
                name="harbor",
                tests=reference,
                timeout_s=config.number("verifier", "timeout_sec", 600.0),
                in_place=config.flag("verifier", "in_place"),
            ),
            solution=reference if "solve.sh" in _solution(path) else "",
            agent_timeout_s=config.number("agent", "timeout_sec", 600.0),
            metadata=config.labels(),
        )


class _Config:
    """task.toml; a value of the wrong type is a TaskError that names its key."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._tables: dict[str, Any] = tomllib.loads(read_text(path))
        except tomllib.TOMLDecodeError as error:
            raise TaskError(f"{path}: {error}") from error

    def number(self, table: str, key: str, default: float) -> float:
        value = self._value(table, key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise self._wrong(table, key, value, "a number above 0")
        return float(value)

    def flag(self, table: str, key: str) -> bool:
        value = self._value(table, key, False)
        if not isinstance(value, bool):
            raise self._wrong(table, key, value, "true or false")
        return value

    def megabytes(self, key: str, default: int) -> int:
        """`memory_mb = 512` of newer files or `memory = "2G"` of older ones."""
        if (newer := self._value("environment", f"{key}_mb", None)) is not None:
            return int(self.number("environment", f"{key}_mb", newer))
        value = self._value("environment", key, f"{default}M")
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", str(value), re.IGNORECASE)
        if not found:
            raise self._wrong("environment", key, value, 'a size such as "2G"')
        return max(1, round(float(found[1]) * _UNITS_MB[found[2].upper()]))

    def labels(self) -> dict[str, str]:
        """[metadata] as text."""
        table = self._tables.get("metadata", {})
        return {key: str(value) for key, value in table.items()} if isinstance(table, Mapping) else {}

    def image(self) -> str:
        return str(self._value("environment", "docker_image", ""))

    def _value(self, table: str, key: str, default: Any) -> Any:
        content = self._tables.get(table, {})
        if not isinstance(content, Mapping):
            raise TaskError(f"{self._path}: [{table}] is not a table")
        return content.get(key, default)

    def _wrong(self, table: str, key: str, value: object, wanted: str) -> TaskError:
        return TaskError(f"{self._path}: {table}.{key} = {value!r} is not {wanted}")


def _environment(config: _Config, reference: str, workdir: str, env: dict[str, str]) -> Environment:
    return Environment(
        files=reference,
        workdir=workdir,
        env=env,
        cpus=config.number("environment", "cpus", 1.0),
        memory_mb=config.megabytes("memory", 1024),
        disk_mb=config.megabytes("storage", 256),
        pids=_PIDS,
    )


def _tests(path: Path) -> Files:
    return read_tree(path / "tests")


def _solution(path: Path) -> Files:
    return read_tree(path / "solution")


def _image(path: Path, workdir: str) -> Image:
    """The Dockerfile's effect; without one, the content of environment/ in the work directory."""
    environment = path / "environment"
    dockerfile = environment / "Dockerfile"
    if dockerfile.is_file():
        return read_dockerfile(dockerfile)
    if prebuilt := _Config(path / "task.toml").image():
        raise TaskError(f"{path / 'task.toml'}: environment.docker_image = {prebuilt!r}: only an image has its files")
    root = workdir or _DEFAULT_WORKDIR
    inside = read_tree(environment) if environment.is_dir() else {}
    return Image(root, {}, {posixpath.join(root, name): file for name, file in inside.items()})


def _inside(image: Image, workdir: str, path: Path) -> dict[str, tuple[bytes, int]]:
    """The image's files relative to the work directory; TaskError for one that lies elsewhere."""
    prefix = workdir.rstrip("/") + "/"
    for name in image.files:
        if not name.startswith(prefix):
            raise TaskError(
                f"{path / 'environment' / 'Dockerfile'}: copies {name}, outside the work directory {workdir}"
            )
    return {name.removeprefix(prefix): file for name, file in image.files.items()}
