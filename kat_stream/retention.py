"""What a log need not keep: the messages of a run that its archive has and nobody will read from the log again.

Owns the rule of `kat-stream topics trim`. Invariant: nothing is removed at or above the least of
- where the archive ends (of this run, and of each run beside it that has a consumer group on this log),
- the positions in the oldest checkpoint that is kept (`batches`),
- what each consumer group on the log has committed,
- the first turn of a group that is in flight in any of these runs, from which a gateway that is restarted rebuilds its
  sessions. Where an archive ends is read before the run's account: a rollout that starts meanwhile lies above it.
`rollout.requests`, `rewards` and `train.steps` are small and read from the start by a sampler that restarts: they stay.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from kat_stream.archive import archived_positions, read_rows
from kat_stream.curriculum import group_of
from kat_stream.errors import CheckpointError
from kat_stream.log.base import Log, TopicPartition
from kat_stream.observe.ledger import Ledger
from kat_stream.observe.sources import LOG_ID
from kat_stream.runs import load_run

TRIMMED = ("turns", "trajectories", "scores", "batches")
"""Where the bytes are."""


class Trimmable(Log, Protocol):
    """A log whose messages can be removed by an operator; the in-memory log keeps its own limits."""

    async def delete_before(self, topic: str, offsets: dict[int, int]) -> None: ...


@dataclass(frozen=True, slots=True)
class Bound:
    """Messages of a partition below `offset` may go, as far as `why` is concerned."""

    place: TopicPartition
    offset: int
    why: str


@dataclass(frozen=True, slots=True)
class Trim:
    """What is to go of one partition, and the bound that keeps the rest."""

    begin: int
    bound: Bound

    @property
    def messages(self) -> int:
        return max(0, self.bound.offset - self.begin)


class _Card(msgspec.Struct):
    positions: dict[str, int]


Account = Callable[[Path], Awaitable[Ledger]]
"""The ledger of the run in a folder, as its archive and the log have it at the time of the call."""


async def plan(log: Log, run_dir: Path, account: Account) -> list[Trim]:
    """What may go of each partition of TRIMMED."""
    found: list[Bound] = [bound async for bound in _bounds(log, run_dir, account)]
    trims = []
    for topic in TRIMMED:
        for number, begin in (await log.beginning_offsets(topic)).items():
            place = TopicPartition(topic, number)
            least = min((bound for bound in found if bound.place == place), key=lambda bound: bound.offset)
            trims.append(Trim(begin, least))
    return trims


async def carry_out(log: Trimmable, trims: Iterable[Trim]) -> None:
    """Remove what the plan says; doing it twice changes nothing."""
    offsets: dict[str, dict[int, int]] = {}
    for trim in trims:
        if trim.messages:
            offsets.setdefault(trim.bound.place.topic, {})[trim.bound.place.partition] = trim.bound.offset
    for topic, before in offsets.items():
        await log.delete_before(topic, before)


async def _bounds(log: Log, run_dir: Path, account: Account) -> AsyncIterator[Bound]:
    groups = [group.name for group in await log.groups()]
    for group in groups:
        for place, offset in (await log.committed(group)).items():
            yield Bound(place, offset, f"group {group}")
    for beside in _runs_on(run_dir, groups):
        config = load_run(beside)
        for bounds in (_archive_bounds, _checkpoint_bounds):
            for bound in bounds(beside, config.run.name, config.log.partitions):
                yield bound
        for bound in _flight_bounds(beside, await account(beside)):
            yield bound


def _runs_on(run_dir: Path, groups: list[str]) -> Iterable[Path]:
    """This run, and those beside it that are registered on the same log by a group of theirs."""
    own = load_run(run_dir).log.url
    for path in run_dir.parent.glob("*/config.toml"):
        config = load_run(path.parent)
        registered = any(group.startswith(f"{config.run.name}.") for group in groups)
        if path.parent.samefile(run_dir) or (config.log.url == own and registered):
            yield path.parent


def _archive_bounds(run_dir: Path, run: str, partitions: int) -> Iterable[Bound]:
    after = archived_positions(run_dir / "archive", LOG_ID, TRIMMED)
    for place in _places(TRIMMED, partitions):
        yield Bound(place, after.get(place, 0), f"archive of {run}")


def _checkpoint_bounds(run_dir: Path, run: str, partitions: int) -> Iterable[Bound]:
    cards = sorted((run_dir / "checkpoints").glob("step-*/state.json"))
    if not cards:
        yield from (Bound(place, 0, f"{run} has no checkpoint") for place in _places(("batches",), partitions))
    for card in cards:
        try:
            positions = msgspec.json.decode(card.read_bytes(), type=_Card).positions
        except (OSError, msgspec.DecodeError) as error:
            raise CheckpointError(f"{card}: {error}") from error
        for place in _places(("batches",), partitions):
            yield Bound(place, positions.get(str(place.partition), 0), f"checkpoint {card.parent.name} of {run}")


def _flight_bounds(run_dir: Path, account: Ledger) -> Iterable[Bound]:
    groups = {group_of(one) for one in account.rollouts("in flight", "requested")}
    columns = ["partition", "offset", "group_id"]
    for row in read_rows(run_dir / "archive", "turns", columns) if groups else ():
        if row["group_id"] in groups:
            place = TopicPartition("turns", row["partition"])
            yield Bound(place, row["offset"], f"group {row['group_id']} is in flight")


def _places(topics: Iterable[str], partitions: int) -> Iterable[TopicPartition]:
    for topic in topics:
        for number in range(partitions):
            yield TopicPartition(topic, number)
