"""A group across all topics: where each of its records lies, and what is missing. Pure: messages in, lines out.

Invariant: a gap is what an earlier record of the same group promises and no record holds; the lines depend on the set
of messages, not on their order or repetition.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from kat_stream.log.base import Delivered, Position
from kat_stream.observe.tail import rollouts_of
from kat_stream.observe.text import clock
from topics import PackedBatch, Record, Reward, RolloutRequest, Trajectory, Turn
from topics.turn import MARKS

STAGES: tuple[type[Record], ...] = (RolloutRequest, Trajectory, Reward, PackedBatch)
_MISSING = dict(zip(STAGES, ("was never requested", "has not ended", "is not graded", "is not packed"), strict=True))


@dataclass(slots=True)
class GroupTrace:
    """Feed it the messages of a run; it keeps those of its group."""

    group_id: str
    _found: dict[Position, tuple[int, Record]] = field(default_factory=dict)

    def apply(self, delivered: Delivered, record: Record) -> None:
        """Take in one message of any group."""
        if getattr(record, "group_id", "") == self.group_id:
            self._found[delivered.position] = (delivered.timestamp_ms, record)

    @property
    def known(self) -> bool:
        return bool(self._found)

    def lines(self) -> Iterator[str]:
        """Positions in the order of time, turns counted together, then the gaps."""
        yield f"group {self.group_id}"
        for position, (timestamp_ms, record) in sorted(self._found.items(), key=lambda item: (item[1][0], item[0])):
            if not isinstance(record, Turn):
                place = f"{position.topic}[{position.partition}] at {position.offset}"
                yield f"{clock(timestamp_ms)} {place}: {type(record).__name__} of {', '.join(rollouts_of(record))}"
        turns = sorted(
            position for position, (_, r) in self._found.items() if isinstance(r, Turn) and r.side not in MARKS
        )
        if turns:
            span = f"turns[{turns[0].partition}] at {turns[0].offset} to {turns[-1].offset}"
            yield f"{len(turns)} turns: {span}"
        gaps = self.gaps()
        yield from (f"gap: {gap}" for gap in gaps)
        if not gaps:
            yield "no gaps"

    def gaps(self) -> list[str]:
        """What is missing, a sentence each, in the order of samples."""
        records = [record for _, record in self._found.values()]
        seen = {kind: {name for record in records if isinstance(record, kind) for name in rollouts_of(record)}
                for kind in STAGES}  # fmt: skip
        ungraded = {r.rollout_id for r in records if isinstance(r, Trajectory) and not r.gradable}
        return [f"{name} {what}" for name in self._members(records) for what in _missing(name, seen, name in ungraded)]

    def _members(self, records: Iterable[Record]) -> list[str]:
        """Every rollout that the group has or must have."""
        asked = [r if isinstance(r, RolloutRequest) else r.request for r in records
                 if isinstance(r, RolloutRequest | Trajectory)]  # fmt: skip
        known = {request.sample: request.rollout_id for request in asked}
        size = max((request.group_size for request in asked), default=0)
        return [known.get(sample, f"{self.group_id}-{sample}") for sample in range(size)]


def _missing(name: str, seen: dict[type[Record], set[str]], never_graded: bool) -> Iterator[str]:
    """The first stage that lacks this rollout; what follows from it cannot be there."""
    for kind, what in _MISSING.items():
        if name not in seen[kind] and not (kind is Reward and never_graded):
            yield what
            return
