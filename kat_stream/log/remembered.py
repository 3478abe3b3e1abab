"""From where a transform's own output must be read back after a restart: bounded, however long the topic is.

A message can be delivered again only from its topic's low-watermark on, so outputs older than every such message need
not be remembered for a restart. The newest KEEP outputs of a partition are remembered all the same, because an
at-least-once producer may repeat a message whose group was written long ago.
Invariant: every output that is not read back is older than the KEEP newest, and all messages that were finished with
it lie below the committed places. The start travels in the commit's metadata (tracker.py), in the same transaction.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from kat_stream.log.base import TopicPartition

KEEP = 200
"""Newest outputs of a partition that are always read back: with 12 partitions, far more groups than may be stale."""
STRIDE = 50
"""Outputs between two marks."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in the output, and what had been taken of the input when the output stood there."""

    offset: int
    taken: Mapping[TopicPartition, int]
    written: int


class Remembered:
    """The marks of one partition, oldest first; the first is where a restart begins to read."""

    def __init__(self, start: int, replayed: list[int], ends: Mapping[TopicPartition, int]) -> None:
        """`replayed`: offsets of the outputs that were read back from `start`; `ends` of the input, now.

        An earlier life may have taken anything up to `ends`: what it wrote is kept until all that is finished.
        """
        self._written = len(replayed)
        self._marks = deque([Mark(start, {}, 0)])
        if len(replayed) > KEEP:
            self._marks.append(Mark(replayed[-KEEP], ends, self._written - KEEP))

    @property
    def start(self) -> int:
        return self._marks[0].offset

    @property
    def due(self) -> bool:
        """Whether it is time for another mark."""
        return self._written - self._marks[-1].written >= STRIDE

    def mark(self, offset: int, taken: Mapping[TopicPartition, int]) -> None:
        """The output ends at `offset`, and nothing from `taken` on has been taken."""
        self._marks.append(Mark(offset, dict(taken), self._written))

    def wrote(self, count: int) -> None:
        self._written += count

    def forget(self, low: Mapping[TopicPartition, int]) -> None:
        """Drop the marks that nothing below the places `low` needs."""
        while len(self._marks) > 1 and self._passed(self._marks[1], low):
            self._marks.popleft()

    def _passed(self, mark: Mark, low: Mapping[TopicPartition, int]) -> bool:
        enough = self._written - mark.written >= KEEP
        return enough and all(low[place] >= position for place, position in mark.taken.items())
