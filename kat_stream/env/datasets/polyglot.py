"""A checkout of the Aider polyglot benchmark (Exercism layout): `polyglot:PATH?language=python`.

Owns the reading of LANG/exercises/practice/NAME. Invariant: neither .meta nor .approaches (they hold solutions) is in
an agent's work tree, and only changes of the exercise's solution files are graded, against its pristine tests.
"""

from __future__ import annotations

import posixpath
import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import msgspec

from kat_stream.env.datasets.base import Files, Spec, entry, read_file, read_text, read_tree, usable
from kat_stream.env.datasets.languages import LANGUAGES, Language
from kat_stream.errors import ConfigError, TaskError
from topics import Environment, Task, VerifierSpec

_SPOILERS = frozenset({".meta", ".approaches", ".articles"})
_INSTRUCTIONS = ("introduction.md", "instructions.md", "instructions.append.md")
_AGENT_TIMEOUT_S = 900.0
# A test of C++'s bank-account has 1,000 threads at once.
_PIDS = 2048
_MANIFEST, _REFERENCE_MANIFEST = "Cargo.toml", ".meta/Cargo-example.toml"
_BOOST = {"/opt/boost": "toolchain:boost"}
_PLAIN = 0o644
_SCRIPT = 0o755


class _FileLists(msgspec.Struct, frozen=True):
    solution: list[str]
    test: list[str]
    example: list[str]
    editor: list[str] = []


class _Exercise(msgspec.Struct, frozen=True):
    """The part of .meta/config.json that is read; paths are relative to the exercise."""

    files: _FileLists


class PolyglotDataset:
    """The exercises of one language, or of all languages whose tests can be run here."""

    name = "polyglot"

    def __init__(self, spec: Spec) -> None:
        spec.check_options(("language",))
        self._spec = spec
        self._root = spec.directory()
        chosen = spec.options.get("language")
        if chosen is not None and chosen not in LANGUAGES:
            raise ConfigError(f"dataset {spec.text!r}: language {chosen!r} is not one of {', '.join(LANGUAGES)}")
        self._languages = [chosen] if chosen else [name for name in LANGUAGES if self._practice(name).is_dir()]
        if not self._languages or not all(self._practice(name).is_dir() for name in self._languages):
            wanted = chosen or "LANGUAGE"
            raise ConfigError(f"dataset {spec.text!r}: {self._practice(wanted)} is not a directory")

    def scan(self) -> Iterator[Task | TaskError]:
        for language in self._languages:
            for path in sorted(self._practice(language).iterdir()):
                if path.is_dir():
                    yield entry(path, partial(self._task, language, path))

    def tasks(self, limit: int | None = None) -> list[Task]:
        return usable(self.scan(), limit)

    def files(self, task: Task) -> Files:
        tree = {**read_tree(self._path(task), without=_SPOILERS), **self.tests(task)}
        ignore = LANGUAGES[task.metadata["language"]].ignore
        if ignore:
            tree.setdefault(".gitignore", (ignore.encode(), _PLAIN))
        return tree

    def tests(self, task: Task) -> Files:
        path = self._path(task)
        tests = _tests(path, _lists(path))
        held_back = LANGUAGES[task.metadata["language"]].held_back.encode()
        if not held_back:
            return tests
        return {name: (re.sub(held_back, b"", content), mode) for name, (content, mode) in tests.items()}

    def solution(self, task: Task) -> Files:
        """`solve.sh` copies the reference files over the stubs."""
        path = self._path(task)
        if crates := _crates(path / _REFERENCE_MANIFEST):
            raise TaskError(f"{path}: the reference solution needs {crates}, and no sandbox has a network")
        files = {f"files/{target}": file for target, file in _solution(path).items()}
        solve = f'cp -R "$(dirname "$0")/files/." {shlex.quote(task.environment.workdir)}/\n'
        return {"solve.sh": (solve.encode(), _SCRIPT), **files}

    def _practice(self, language: str) -> Path:
        return self._root / language / "exercises" / "practice"

    def _path(self, task: Task) -> Path:
        language, _, name = task.task_id.partition("/")
        path = self._practice(language) / name
        if language not in self._languages or not name or not path.is_dir():
            raise TaskError(f"{self._spec.text}: no exercise {task.task_id!r}")
        return path

    def _task(self, name: str, path: Path) -> Task:
        lists = _lists(path)
        # What a rollout, a grading or the oracle would miss is found now, and not in the middle of one.
        read_tree(path, without=_SPOILERS)
        _tests(path, lists)
        _solution(path)
        if crates := _crates(path / _MANIFEST):
            raise TaskError(f"{path / _MANIFEST}: needs {crates}, and no sandbox has a network")
        reference = self._spec.reference(f"{name}/{path.name}")
        language = LANGUAGES[name]
        return Task(
            run="",
            task_id=f"{name}/{path.name}",
            dataset=self.name,
            environment=_environment(language, reference, path),
            instruction=_instruction(path, lists, language),
            verifier=VerifierSpec(
                name="command",
                tests=reference,
                timeout_s=language.timeout_s,
                command=language.command,
                options={
                    "tests_directory": f"/work/{path.name}",
                    # Also the further files of the reference, of which nobody tells an agent: it may have them as well.
                    "include": "\n".join(dict.fromkeys((*_gradable(lists), *_added(path, lists)))),
                    # The tests run the agent's code: an endless loop in it is a failed test, not a failed grader.
                    "timeout": "fail",
                },
            ),
            solution="" if _crates(path / _REFERENCE_MANIFEST) else reference,
            agent_timeout_s=_AGENT_TIMEOUT_S,
            metadata={"language": name},
        )


def _environment(language: Language, reference: str, path: Path) -> Environment:
    # CMakeLists.txt of the C++ exercises takes the project's name from its directory.
    return Environment(
        files=reference,
        workdir=f"/work/{path.name}",
        env=language.env,
        memory_mb=language.memory_mb,
        disk_mb=language.disk_mb,
        cpus=language.cpus,
        pids=_PIDS,
        mounts={**language.mounts, **(_BOOST if _needs_boost(path) else {})},
    )


def _needs_boost(path: Path) -> bool:
    project = path / "CMakeLists.txt"
    return project.is_file() and "find_package(Boost" in read_text(project)


def _crates(manifest: Path) -> str:
    """The crates that a Cargo.toml depends on; empty if there are none, or no such file."""
    if not manifest.is_file():
        return ""
    tables = tomllib.loads(read_text(manifest))
    names = sorted({*tables.get("dependencies", {}), *tables.get("dev-dependencies", {})})
    return f"the crates {', '.join(names)}" if names else ""


def _lists(path: Path) -> _FileLists:
    config = path / ".meta" / "config.json"
    try:
        lists = msgspec.json.decode(config.read_bytes(), type=_Exercise).files
    except OSError as error:
        raise TaskError(f"{config}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise TaskError(f"{config}: {error}") from error
    for key in ("solution", "test", "example"):
        if not getattr(lists, key):
            raise TaskError(f"{config}: files.{key} is empty; the exercise cannot be graded")
    if not _gradable(lists):
        raise TaskError(f"{config}: every file of files.solution is one of files.test; nothing is left to be graded")
    for name in lists.solution + lists.test + lists.example + lists.editor:
        if not name.isprintable():
            raise TaskError(f"{config}: {name!r} is not the name of a file")
        if not (path / name).resolve().is_relative_to(path.resolve()):
            raise TaskError(f"{config}: {name} lies outside the exercise")
    return lists


def _tests(path: Path, lists: _FileLists) -> Files:
    return {name: read_file(path / name) for name in lists.test + lists.editor if name not in lists.solution}


def _solution(path: Path) -> Files:
    """The reference files under the names of those they replace."""
    return {target: read_file(path / source) for source, target in _reference(path).items()}


def _reference(path: Path) -> dict[str, str]:
    """Reference file -> the file it replaces, both relative to the exercise."""
    lists = _lists(path)
    # Java names a file by its class, so those of the same name belong together; of others the order says it.
    named = {posixpath.basename(target): target for target in lists.solution}
    pairs = {example: named[name] for example in lists.example if (name := posixpath.basename(example)) in named}
    free = [target for target in lists.solution if target not in pairs.values()]
    for example in lists.example:
        if example not in pairs:
            pairs[example] = target = _target(example, free, lists)
            free = [other for other in free if other != target]
    if (path / _REFERENCE_MANIFEST).is_file():
        pairs[_REFERENCE_MANIFEST] = _MANIFEST
    return pairs


def _target(example: str, free: list[str], lists: _FileLists) -> str:
    """The first free file of the same kind; without one a file of its own beside those that are not free."""
    suffix = posixpath.splitext(example)[1]
    same, taken = ([name for name in names if name.endswith(suffix)] for names in (free, lists.solution))
    if not taken:
        raise TaskError(f"{example}: no file of files.solution is of its kind")
    return same[0] if same else posixpath.join(posixpath.dirname(taken[0]), posixpath.basename(example))


def _added(path: Path, lists: _FileLists) -> list[str]:
    """Files of the reference solution that an agent is not told of."""
    return [name for name in _reference(path).values() if name not in (*lists.solution, *lists.test, *lists.editor)]


def _gradable(lists: _FileLists) -> list[str]:
    return [name for name in lists.solution if name not in lists.test]


def _instruction(path: Path, lists: _FileLists, language: Language) -> str:
    parts = [(path / ".docs" / name) for name in _INSTRUCTIONS]
    texts = [read_text(part).strip() for part in parts if part.is_file()]
    if not texts:
        raise TaskError(f"{path / '.docs' / 'instructions.md'}: missing")
    files = ", ".join(_gradable(lists))
    ending = (
        f"Solve this by changing only {files}. Keep the names of functions and classes: the tests use them. "
        f"Use the standard library only. The tests are run with: {language.command}"
    )
    return "\n\n".join([*texts, ending])
