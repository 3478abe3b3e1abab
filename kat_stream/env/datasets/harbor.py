"""Directories of Harbor / Terminal-Bench 2 tasks that need no image build.

Owns the reading of task.toml, instruction.md, environment/, tests/ and solution/. Invariant: a directory either gives a
complete Task or a TaskError that names the file and the reason, and no file outside it is ever read. Source of the
format: research/benchmarks.md 2.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from kat_stream.env.datasets.base import Files, Spec, entry, read_text, read_tree, usable
from kat_stream.env.datasets.dockerfile import Image, read_dockerfile
from kat_stream.env.datasets.task_toml import TaskToml
from kat_stream.env.verifiers import get_verifier
from kat_stream.errors import TaskError
from topics import Environment, Task, VerifierSpec

_DEFAULT_WORKDIR = "/app"
_STORAGE_MB = 256
_PIDS = 256
_PAGE = 4096  # bytes; the least that a file takes in a sandbox
# The tests have these for themselves.
_TESTS_OWN = ("/tests/", "/logs/")
# A sandbox has them from the host, read-only.
_SYSTEM = (
    *("/bin/", "/sbin/", "/lib/", "/lib64/", "/etc/", "/proc/", "/sys/", "/dev/", "/run/"),
    *("/usr/bin/", "/usr/sbin/", "/usr/lib/"),
)


class HarborDataset:
    """`harbor:PATH`: PATH is one task directory or a directory of them; `?verifier=NAME` grades them by another."""

    name = "harbor"

    def __init__(self, spec: Spec) -> None:
        spec.check_options(("verifier",))
        self._root = spec.directory()
        self._verifier = spec.options.get("verifier", "harbor")
        get_verifier(self._verifier)
        self._spec = spec
        single = (self._root / "task.toml").exists()
        self._paths = [self._root] if single else sorted(filter(_may_be_task, self._root.iterdir()))

    def scan(self) -> Iterator[Task | TaskError]:
        return (entry(path, partial(self._task, path)) for path in self._paths)

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
        if not path.name.isprintable():
            raise TaskError(f"{path.parent}: {path.name!r} is not the name of a task")
        config = TaskToml(path / "task.toml")
        instruction = read_text(path / "instruction.md")
        _check_tests(path, config, script=self._verifier == "harbor")
        image = _image(path, config.workdir())
        reference = self._spec.reference(path.name)
        workdir = config.workdir() or (image.workdir if image.workdir != "/" else _DEFAULT_WORKDIR)
        _check_workdir(workdir, path)
        _check_room(_inside(image, workdir, path), config.megabytes("storage", _STORAGE_MB), path)
        return Task(
            run="",
            task_id=path.name,
            dataset=self.name,
            environment=_environment(config, reference, workdir, {**image.env, **config.variables()}),
            instruction=instruction.strip(),
            verifier=VerifierSpec(
                name=self._verifier,
                tests=reference,
                timeout_s=config.number("verifier", "timeout_sec", 600.0),
                in_place=config.flag("verifier", "in_place"),
            ),
            solution=reference if "solve.sh" in _solution(path) else "",
            agent_timeout_s=config.number("agent", "timeout_sec", 600.0),
            metadata=config.labels(),
        )


def _may_be_task(path: Path) -> bool:
    """A set that was cloned lies beside a .git, and more of that kind."""
    return path.is_dir() and not path.name.startswith(".")


def _check_tests(path: Path, config: TaskToml, *, script: bool) -> None:
    tests = _tests(path)
    if script and "test.sh" not in tests:
        raise TaskError(f"{path / 'tests' / 'test.sh'}: missing; a task without tests cannot be graded")
    if "Dockerfile" in tests and config.separate_tests():
        raise TaskError(f"{path / 'tests' / 'Dockerfile'}: the tests' own image is not built")


def _environment(config: TaskToml, reference: str, workdir: str, env: dict[str, str]) -> Environment:
    return Environment(
        files=reference,
        workdir=workdir,
        env=env,
        cpus=config.number("environment", "cpus", 1.0),
        memory_mb=config.megabytes("memory", 1024),
        disk_mb=config.megabytes("storage", _STORAGE_MB),
        pids=_PIDS,
    )


def _tests(path: Path) -> Files:
    return read_tree(path / "tests")


def _solution(path: Path) -> Files:
    return read_tree(path / "solution")


def _image(path: Path, workdir: str) -> Image:
    """The Dockerfile's effect; without one, the content of environment/ in the work directory."""
    environment = path / "environment"
    if environment.is_symlink():
        raise TaskError(f"{environment}: a link, not a directory")
    if (environment / "docker-compose.yaml").exists():
        raise TaskError(f"{environment / 'docker-compose.yaml'}: services beside the task's own are not supported")
    dockerfile = environment / "Dockerfile"
    if dockerfile.is_file():
        return read_dockerfile(dockerfile)
    if prebuilt := TaskToml(path / "task.toml").image():
        raise TaskError(f"{path / 'task.toml'}: environment.docker_image = {prebuilt!r}: only an image has its files")
    root = workdir or _DEFAULT_WORKDIR
    inside = read_tree(environment) if environment.is_dir() else {}
    return Image(root, {}, {posixpath.join(root, name): file for name, file in inside.items()})


def _check_workdir(workdir: str, path: Path) -> None:
    """TaskError for a directory in which no sandbox can have a work tree."""
    if f"{workdir}/".startswith(_TESTS_OWN):
        raise TaskError(f"{path}: the work directory {workdir} is one that the tests have for themselves")
    if f"{workdir}/".startswith(_SYSTEM) or workdir in ("/", "/usr"):
        raise TaskError(f"{path}: the work directory {workdir} is one of the system's")


def _check_room(files: Files, storage_mb: int, path: Path) -> None:
    size = sum(-(-len(content) // _PAGE) * _PAGE for content, _ in files.values())
    if size > storage_mb << 20:
        raise TaskError(f"{path}: files of {size} bytes do not fit into environment.storage of {storage_mb} MiB")


def _inside(image: Image, workdir: str, path: Path) -> dict[str, tuple[bytes, int]]:
    """The image's files relative to the work directory; TaskError for one that lies elsewhere."""
    prefix = workdir.rstrip("/") + "/"
    for name in image.files:
        if not name.startswith(prefix):
            raise TaskError(
                f"{path / 'environment' / 'Dockerfile'}: copies {name}, outside the work directory {workdir}"
            )
    return {name.removeprefix(prefix): file for name, file in image.files.items()}
