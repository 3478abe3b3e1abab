"""Who gets which partitions of a group: pure.

Invariant: every unit has exactly one owner, loads differ by at most one unit, and members keep what they have as far as
that allows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def assign[Unit, Name](units: Iterable[Unit], owned: Mapping[Name, Iterable[Unit]]) -> dict[Name, set[Unit]]:
    """Units for each member, given what each one owned before; empty without members."""
    free = set(units)
    if not owned:
        return {}
    low, extra = divmod(len(free), len(owned))
    result: dict[Name, set[Unit]] = {}
    for name, before in sorted(owned.items(), key=lambda item: -len(set(item[1]))):
        keep = [unit for unit in before if unit in free][: low + (1 if extra else 0)]
        extra -= len(keep) > low
        result[name] = set(keep)
        free -= result[name]
    for unit in sorted(free, key=repr):
        min(result.values(), key=len).add(unit)
    return result
