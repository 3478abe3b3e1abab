"""Finds the variants of a protocol by name, from the entry points of every installed package.

Owns the only place that loads a plug-in. Invariant: an unknown name is a ConfigError that lists the known ones, and a
variant of somebody else's package is found the same way as ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from kat_stream.errors import ConfigError


def names(group: str) -> list[str]:
    """Names registered under an entry-point group such as `kat_stream.datasets`, sorted."""
    return sorted({point.name for point in entry_points(group=group)})


def load(group: str, name: str, also: Sequence[str] = ()) -> Any:
    """The object registered as `name`; ConfigError if there is none or it cannot be imported.

    `also`: names of the same kind that are known elsewhere, for the error.
    """
    for point in entry_points(group=group):
        if point.name == name:
            return _import(point)
    known = sorted({*names(group), *also})
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"{group}: no {name!r}{hint} (known: {', '.join(known) or 'none'})")


def _import(point: EntryPoint) -> Any:
    try:
        return point.load()
    except Exception as error:  # what runs when a module of somebody else's is imported may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{point.group}: {point.name!r} cannot be imported from {point.value}: {reason}") from error
