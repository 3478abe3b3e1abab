"""Finding an algorithm by the name that a configuration uses: `find(LOSSES, ...)`, `find(ADVANTAGES, ...)`."""

from __future__ import annotations

from collections.abc import Mapping

from kat_stream.errors import ConfigError


def find[V](table: Mapping[str, V], name: str) -> V:
    """The entry of that name; `ConfigError` lists what there is."""
    if name not in table:
        raise ConfigError(f"{name!r} is none of {', '.join(sorted(table))}")
    return table[name]
