"""The groups of recorded steps, as the trainer had them: from the live log or from the archive.

Invariant: a group is the record at the position that the step names; it is never another attempt of the same group.
Memory holds the groups of the steps that were asked for, nothing else: callers ask for some steps at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator, Collection, Mapping, Sequence

from kat_stream.errors import BatchError, DataError, DecodeError, LogError
from kat_stream.log import Delivered
from kat_stream.observe.sources import LogSource, Source
from kat_stream.rl.step import check_group, without_rows
from topics import PackedBatch, TrainStep

TOPIC = "batches"
READ_S = 120.0
"""Longest time to read a window of steps from a live log."""
Place = tuple[int, int]


async def groups_of(source: Source, steps: Sequence[TrainStep]) -> list[list[PackedBatch]]:
    """The groups of each step, in the order in which they were merged. `DataError` names the first that is gone."""
    for step in steps:
        if len(step.batches) != len(step.groups):
            raise DataError(f"step {step.step} does not say where its groups lie: an earlier build made it")
    wanted = {named for step in steps for named in zip(step.batches, step.groups, strict=True)}
    places = {place for place, _ in wanted}  # in two in-memory logs one place may be that of two groups
    found: dict[tuple[Place, str], list[tuple[int, PackedBatch]]] = defaultdict(list)
    async for delivered in _messages(source, places):
        place = delivered.position.partition, delivered.position.offset
        group = _group(delivered, source.run) if place in places else None
        if group is not None and (place, group.group_id) in wanted:
            found[place, group.group_id].append((delivered.timestamp_ms, group))
    return [[_chosen(found, step, i, source) for i in range(len(step.batches))] for step in steps]


def _group(delivered: Delivered, run: str) -> PackedBatch | None:
    """As the trainer takes it: one whose rows are inconsistent counts, with nothing in it to learn."""
    try:
        record = delivered.record()
    except DecodeError:
        return None
    if not isinstance(record, PackedBatch) or record.run != run:
        return None
    try:
        check_group(record)
    except BatchError as error:
        return without_rows(record, str(error))
    return record


def _chosen(
    found: Mapping[tuple[Place, str], list[tuple[int, PackedBatch]]], step: TrainStep, index: int, source: Source
) -> PackedBatch:
    """A run on the in-memory log numbers offsets anew when it goes on: then the newest before the step is meant."""
    there = found.get((step.batches[index], step.groups[index]), [])
    before = [one for one in there if one[0] <= step.unix_s * 1000] or there
    if not before:
        partition, offset = step.batches[index]
        place = f"{TOPIC}[{partition}]@{offset}"
        raise DataError(f"step {step.step}: group {step.groups[index]} is gone: {source.where} has no {place} any more")
    return max(before, key=lambda one: one[0])[1]


async def _messages(source: Source, wanted: Collection[Place]) -> AsyncIterator[Delivered]:
    """Of a live log what lies between the first and the last place of each partition; of an archive everything.

    The archive has what the log has not any more (`kat-stream topics trim`), also if it went while it was read.
    """
    if isinstance(source, LogSource):
        try:
            async for delivered in _between(source, wanted):
                yield delivered
            return
        except LogError:
            if not await _trimmed(source, wanted):
                raise
    async for delivered in source.messages((TOPIC,)):
        yield delivered


async def _between(source: LogSource, wanted: Collection[Place]) -> AsyncIterator[Delivered]:
    missing = set(wanted)
    start = {(TOPIC, p): min(at for q, at in wanted if q == p) for p in {p for p, _ in wanted}}
    partitions = sorted(partition for _, partition in start)
    async with source.log.follow((TOPIC,), start=start, partitions=partitions) as follower:
        async for delivered in follower.catch_up(READ_S):
            yield delivered
            missing.discard((delivered.position.partition, delivered.position.offset))
            if not missing:
                return


async def _trimmed(source: LogSource, wanted: Collection[Place]) -> bool:
    begins = await source.log.beginning_offsets(TOPIC)
    return any(at < begins[partition] for partition, at in wanted)
