"""Trees to rows of at most a budget of tokens, and rows to micro-batches.

Invariant: a tree is never cut here and is in exactly one row; rows hold whole trees side by side, in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

from kat_stream.trees.layout import TreeLayout, concat


def pack(layouts: Sequence[TreeLayout], budget_tokens: int) -> list[TreeLayout]:
    """First-fit decreasing. A tree larger than the budget becomes a row of its own."""
    rows: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(layouts)), key=lambda i: -len(layouts[i])):
        size = len(layouts[number])
        row = next((k for k, free in enumerate(room) if free >= size), None)
        if row is None:
            rows.append([number])
            room.append(budget_tokens - size)
        else:
            rows[row].append(number)
            room[row] -= size
    return [concat([layouts[i] for i in sorted(row)]) for row in rows]


def micro_batches(sizes: Sequence[int], budget_tokens: int) -> list[list[int]]:
    """Consecutive items grouped up to the budget; an item larger than it stands alone."""
    groups: list[list[int]] = []
    used = 0
    for number, size in enumerate(sizes):
        if not groups or used + size > budget_tokens:
            groups.append([])
            used = 0
        groups[-1].append(number)
        used += size
    return groups
