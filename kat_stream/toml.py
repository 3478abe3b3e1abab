"""TOML in and out: a file, one override of the command line, and a value written back.

Invariant: what `literal` writes, `tomllib` reads as the same value; what cannot be read is a ConfigError naming it.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from kat_stream.errors import ConfigError


def read(path: Path) -> dict[str, Any]:
    """The tables of a file."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error


def override(table: dict[str, Any], assignment: str) -> None:
    """Set `section.key=value` in the table; the value is TOML, or a bare word, which is a string."""
    try:
        assignment.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"--set {assignment!a}: not UTF-8") from error
    key, equals, text = assignment.partition("=")
    section, dot, name = key.strip().rpartition(".")
    if not equals or not dot or not name:
        raise ConfigError(f"--set {assignment}: expected section.key=value, for example --set run.steps=20")
    try:
        value = tomllib.loads(f"v = {text.strip()}")["v"]
    except (tomllib.TOMLDecodeError, RecursionError):
        value = text.strip()
    target: Any = table
    for part in section.split("."):
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            raise ConfigError(f"--set {key.strip()}: `{section}` is no section")
    target[name] = value


def literal(value: Any) -> str:
    """The value as TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML's escapes are JSON's
    if isinstance(value, list | tuple):
        return "[" + ", ".join(literal(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{literal(str(key))} = {literal(item)}" for key, item in value.items()) + " }"
    return repr(value)
