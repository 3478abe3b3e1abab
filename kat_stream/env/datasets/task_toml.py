"""task.toml of a Harbor / Terminal-Bench 2 task: its numbers, texts and variables.

Owns the decision what of it this project can do. Invariant: a value of the wrong type, and anything that would make
another task of it and is not done here (a second step, a GPU, another image for the tests), is a TaskError that names
file and key. Source of the format: research/benchmarks.md 2; Harbor 0.26, models/task/config.py.
"""

from __future__ import annotations

import math
import posixpath
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kat_stream.env.datasets.base import read_text
from kat_stream.env.sandboxes.base import check_variables
from kat_stream.errors import ConfigError, TaskError

_UNITS_MB = {"": 1 / (1 << 20), "K": 1 / 1024, "M": 1, "G": 1024, "T": 1024 * 1024}
_LARGEST = 10**9
# Empty, as most files have them, they say nothing.
_NOT_DONE = (
    ("environment", ("gpus", "tpu", "mcp_servers", "healthcheck")),
    ("verifier", ("env", "environment", "collect")),
    ("solution", ("env",)),
)
_OF_HOST = re.compile(r"\$\{\w+(?::-(?P<default>.*))?\}", re.DOTALL)


class TaskToml:
    """One file, read and found to be one that can be done."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._tables: dict[str, Any] = tomllib.loads(read_text(path))
        except (ValueError, RecursionError) as error:
            raise TaskError(f"{path}: {error}") from error
        if "steps" in self._tables:
            raise TaskError(f"{path}: [[steps]]: a task of several steps is not supported")
        for table, keys in _NOT_DONE:
            for key in keys:
                if self._value(table, key, None):
                    raise TaskError(f"{path}: {table}.{key} is not supported")
        if str(system := self._value("environment", "os", "linux")).lower() != "linux":
            raise self._wrong("environment", "os", system, "linux")

    def number(self, table: str, key: str, default: float) -> float:
        value = self._value(table, key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _LARGEST:
            raise self._wrong(table, key, value, f"a number above 0 and at most {_LARGEST}")
        return float(value)

    def flag(self, table: str, key: str) -> bool:
        value = self._value(table, key, False)
        if not isinstance(value, bool):
            raise self._wrong(table, key, value, "true or false")
        return value

    def megabytes(self, key: str, default: int) -> int:
        """`memory_mb = 512` of newer files or `memory = "2G"` of older ones."""
        if (newer := self._value("environment", f"{key}_mb", None)) is not None:
            return math.ceil(self.number("environment", f"{key}_mb", newer))
        value = self._value("environment", key, f"{default}M")
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", str(value), re.IGNORECASE)
        size = float(found[1]) * _UNITS_MB[found[2].upper()] if found else math.inf
        if size > _LARGEST:
            raise self._wrong("environment", key, value, 'a size such as "2G"')
        return max(1, round(size))

    def labels(self) -> dict[str, str]:
        """[metadata] as text."""
        table = self._tables.get("metadata", {})
        return {key: str(value) for key, value in table.items()} if isinstance(table, Mapping) else {}

    def image(self) -> str:
        return str(self._value("environment", "docker_image", ""))

    def separate_tests(self) -> bool:
        """The tests run in an image of their own, if there is one."""
        return bool(self._value("verifier", "environment_mode", "") == "separate")

    def workdir(self) -> str:
        """What goes before the WORKDIR of a Dockerfile; empty if nothing does."""
        path = self._value("environment", "workdir", "")
        if not isinstance(path, str) or path[:1] not in ("", "/"):
            raise self._wrong("environment", "workdir", path, "an absolute path")
        return path and posixpath.normpath(path)

    def variables(self) -> dict[str, str]:
        """[environment.env]; `${NAME:-default}` is the default, for no variable of the host enters a sandbox."""
        table = self._value("environment", "env", {})
        if not isinstance(table, Mapping):
            raise self._wrong("environment", "env", table, "a table")
        found: dict[str, str] = {}
        for name, value in table.items():
            if not isinstance(value, str):
                raise self._wrong("environment.env", name, value, "a text")
            reference = _OF_HOST.fullmatch(value)
            if reference and reference["default"] is None:
                raise self._wrong(
                    "environment.env", name, value, "set: no sandbox sees the host's; see ${NAME:-default}"
                )
            found[name] = reference["default"] if reference else value
        try:
            check_variables(found)
        except ConfigError as error:
            raise TaskError(f"{self._path}: environment.env: {error}") from error
        return found

    def _value(self, table: str, key: str, default: Any) -> Any:
        content = self._tables.get(table, {})
        if not isinstance(content, Mapping):
            raise TaskError(f"{self._path}: [{table}] is not a table")
        return content.get(key, default)

    def _wrong(self, table: str, key: str, value: object, wanted: str) -> TaskError:
        return TaskError(f"{self._path}: {table}.{key} = {value!r} is not {wanted}")
