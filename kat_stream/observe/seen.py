"""Which names were seen, in a few bytes a name: a run goes on for weeks, and who watches it must not grow with it.

Invariant: nothing is forgotten. Of a name only 64 bits are kept, so that one of n names is taken for another with a
probability below n^2 / 2^65: of a hundred million names, 1 in 3,700.
"""

from __future__ import annotations

from array import array

BITS = 64
FIRST = 64
"""Slots of an empty set; a power of two, as ever after."""


def hashed(name: str) -> int:
    """64 bits that stand for a name within this process, never 0."""
    return hash(name) & (1 << BITS) - 1 or 1


class Seen:
    """A set of names that can only grow: 12 to 24 bytes a name."""

    def __init__(self) -> None:
        self._slots = array("Q", bytes(8 * FIRST))
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, name: str) -> bool:
        return self._slots[self._place(hashed(name))] != 0

    def add(self, name: str) -> bool:
        """Whether it was new."""
        code = hashed(name)
        place = self._place(code)
        if self._slots[place]:
            return False
        self._slots[place] = code
        self._count += 1
        if 3 * self._count > 2 * len(self._slots):
            self._grow()
        return True

    def _place(self, code: int) -> int:
        """Where a code is, or the free slot where it belongs."""
        last = len(self._slots) - 1
        place = code & last
        while self._slots[place] not in (0, code):
            place = place + 1 & last
        return place

    def _grow(self) -> None:
        codes = [code for code in self._slots if code]
        self._slots = array("Q", bytes(2 * 8 * len(self._slots)))
        for code in codes:
            self._slots[self._place(code)] = code
