"""What is finished in one partition when messages finish in any order.

Invariant: the committed offset is the low-watermark of open messages, and what is finished beyond it is remembered in
the commit's metadata, so that after a restart exactly the unfinished messages are delivered again.
Metadata: `r1:` and run lengths, open and finished in turn, starting at the offset: `r1:2,5,1,3` = 2 open, 5 finished,
1 open, 3 finished. ASCII, at most METADATA_LIMIT characters (the broker refuses more than 4096); what does not fit is
repeated after a restart. A transform adds ` o2:` and the offset from which its own output is read back (transform.py).
"""

from __future__ import annotations

from bisect import bisect_left

from kat_stream.log.base import Committed

METADATA_LIMIT = 3000
_TAG = "r1:"
_OUTPUT = "o2:"


class Tracker:
    """Open messages of one partition, from its committed place on."""

    def __init__(self, start: Committed) -> None:
        self.position = start.offset
        """The next offset to be taken."""
        self._open: list[int] = []
        self._finished_before = decode_runs(start)

    @property
    def open(self) -> int:
        """How many messages are open."""
        return len(self._open)

    def take(self, offset: int) -> bool:
        """Open a message; False if it was finished in an earlier life or taken already."""
        if offset < self.position:
            return False
        self.position = offset + 1
        if _inside(self._finished_before, offset):
            return False
        self._open.append(offset)
        return True

    def finish(self, offset: int) -> None:
        """Close a message; ValueError if it is not open."""
        index = bisect_left(self._open, offset)
        if index == len(self._open) or self._open[index] != offset:
            raise ValueError(f"offset {offset} is not open")
        del self._open[index]

    def advance(self, position: int) -> None:
        """Nothing more comes before `position` (transaction markers, compacted gaps)."""
        self.position = max(self.position, position)

    def commit(self) -> Committed:
        """The place to commit now."""
        low = self._open[0] if self._open else self.position
        later = [run for run in self._finished_before if run[1] > self.position]
        return Committed(low, encode_runs(low, self._finished_here() + later))

    def _finished_here(self) -> list[tuple[int, int]]:
        """[start, end) between open messages, below the position."""
        edges = [*self._open, self.position]
        return [(a + 1, b) for a, b in zip(edges, edges[1:], strict=False) if b > a + 1]


def _inside(runs: list[tuple[int, int]], offset: int) -> bool:
    index = bisect_left(runs, (offset + 1,)) - 1
    return index >= 0 and offset < runs[index][1]


def encode_runs(low: int, runs: list[tuple[int, int]]) -> str:
    """Finished runs [start, end) beyond `low` as metadata; empty if there are none."""
    text, at = "", low
    for start, end in runs:
        start = max(start, at)
        more = f"{',' if text else ''}{start - at},{end - start}"
        if len(_TAG) + len(text) + len(more) > METADATA_LIMIT:
            break
        text, at = text + more, end
    return _TAG + text if text else ""


def decode_runs(committed: Committed) -> list[tuple[int, int]]:
    """The runs of `encode_runs`; metadata that is not ours says nothing."""
    text = _part(committed, _TAG)
    if not text:
        return []
    lengths = [int(part) for part in text.split(",")]
    runs, at = [], committed.offset
    for unfinished, finished in zip(lengths[::2], lengths[1::2], strict=True):
        runs.append((at + unfinished, at + unfinished + finished))
        at = runs[-1][1]
    return runs


def with_output(committed: Committed, offset: int) -> Committed:
    """The place, and from where the stage's own output is to be read back."""
    return Committed(committed.offset, f"{committed.metadata} {_OUTPUT}{offset}".strip())


def output_of(committed: Committed) -> int:
    """What `with_output` added; 0 if nothing did."""
    return int(_part(committed, _OUTPUT) or 0)


def _part(committed: Committed, tag: str) -> str:
    parts = (part for part in committed.metadata.split(" ") if part.startswith(tag))
    return next(parts, "").removeprefix(tag)
