"""Where a viewer reads the records of a run: its archive, then its log from where the archive ends.

A log that lives in the run's own process, or is away, leaves the archive alone.
Invariant: a message comes once, however the archive grows and the log is trimmed meanwhile; a source gives only records
of its run, and a message that cannot be read is passed over and counted, never an exception: views must work on a run
that went wrong.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from zlib import crc32

from kat_stream.config import SecuritySection
from kat_stream.errors import DataError, DecodeError, LogError, LogUnavailable
from kat_stream.log import Delivered, Log, open_log
from kat_stream.observe.heads import HEADS, Head, columns_of, head_of, head_of_row
from kat_stream.observe.ledger import Ledger
from kat_stream.observe.state import RunState
from kat_stream.runs import blobs_url, load_run
from topics import CATALOGUE, Record, topic_named

logger = logging.getLogger(__name__)

ALL_TOPICS = tuple(topic.name for topic in CATALOGUE)
LOG_ID = "kafka"
"""What an archive calls a broker's offsets (kat_stream/service.py:Context.log_id)."""
CATCH_UP_S = 120.0
"""Longest time to read what is on a live log."""


class Source(Protocol):
    """The messages of one run."""

    @property
    def where(self) -> str:
        """For people: the log's address or the archive's folder."""

    @property
    def run(self) -> str:
        """Empty: every run on the log."""

    def messages(self, topics: Sequence[str] = ALL_TOPICS, group_id: str = "") -> AsyncIterator[Delivered]:
        """Everything that is there now, each partition in the order of its offsets.

        With a `group_id`, of topics by group only what may be of that group.
        """

    def heads(self) -> AsyncIterator[Head]:
        """What an account needs of the run's records, in no order, perhaps twice."""


@dataclass(slots=True)
class ArchiveSource:
    """The Parquet files of a run; nothing more comes."""

    directory: Path
    run: str

    @property
    def where(self) -> str:
        return str(self.directory)

    async def messages(self, topics: Sequence[str] = ALL_TOPICS, group_id: str = "") -> AsyncIterator[Delivered]:
        for delivered in archived_messages(self.directory, topics, group_id):
            yield delivered

    async def heads(self) -> AsyncIterator[Head]:
        for head in archived_heads(self.directory, self.run):
            yield head


@dataclass(slots=True)
class LogSource:
    """A log that is started, after what an archive has of it."""

    log: Log
    where: str
    run: str
    archive: Path | None = None

    async def messages(self, topics: Sequence[str] = ALL_TOPICS, group_id: str = "") -> AsyncIterator[Delivered]:
        read: dict[tuple[str, int], int] = {}  # the first offset that was not handed out
        while True:
            starts = await self._starts(topics)
            for delivered in archived_messages(self.archive, topics, group_id) if self.archive is not None else ():
                place = delivered.position.topic_partition
                if read.get(place, 0) <= delivered.position.offset < starts.get(place, 0):
                    yield delivered
            read = {place: max(start, read.get(place, 0)) for place, start in starts.items()}
            try:
                for some, partitions in await self._by_partitions(topics, group_id):
                    async for delivered in self._rest(some, read, partitions):
                        read[delivered.position.topic_partition] = delivered.position.offset + 1
                        yield delivered
                return
            except LogError:
                if not await self._trimmed(starts):
                    raise

    async def heads(self) -> AsyncIterator[Head]:
        topics = tuple(HEADS)
        while True:
            starts = await self._starts(topics)
            for head in archived_heads(self.archive, self.run) if self.archive is not None else ():
                yield head
            try:
                async for delivered in self._rest(topics, starts, None):
                    found = head_of(delivered)
                    if found is not None and self.run in ("", found.run):
                        yield found
                return
            except LogError:
                if not await self._trimmed(starts):
                    raise

    async def _rest(
        self, topics: Sequence[str], starts: Mapping[tuple[str, int], int], partitions: Sequence[int] | None
    ) -> AsyncIterator[Delivered]:
        async with self.log.follow(topics, start=starts, partitions=partitions) as follower:
            async for delivered in follower.catch_up(CATCH_UP_S):
                yield delivered

    async def _starts(self, topics: Sequence[str]) -> dict[tuple[str, int], int]:
        """Where the archive ends. DataError if the log does not go on there: messages are lost, or it is another.

        Asked between the log's beginning and its end: nobody trims above the archive's end, which only grows.
        """
        if self.archive is None:
            return {}
        from kat_stream.archive import archived_positions

        begins = {topic: await self.log.beginning_offsets(topic) for topic in topics}
        archived = archived_positions(self.archive, LOG_ID, topics)
        starts: dict[tuple[str, int], int] = {}
        for topic in topics:
            ends = await self.log.end_offsets(topic)
            for partition, begin in begins[topic].items():
                after = starts[topic, partition] = archived.get((topic, partition), begin)
                if not begin <= after <= ends[partition]:
                    there = f"{self.where} has {begin} to {ends[partition]}"
                    raise DataError(f"{topic}[{partition}]: the archive ends at offset {after}, {there}")
        return starts

    async def _trimmed(self, starts: Mapping[tuple[str, int], int]) -> bool:
        """Whether the log begins later by now: what is missing has come into the archive, which is read again."""
        begins = {topic: await self.log.beginning_offsets(topic) for topic in {topic for topic, _ in starts}}
        return any(begins[topic][partition] > start for (topic, partition), start in starts.items())

    async def _by_partitions(self, topics: Sequence[str], group_id: str) -> list[tuple[list[str], list[int] | None]]:
        """Topics with the partitions to read of them: of a group's topics the group's one."""
        grouped = [name for name in topics if group_id and topic_named(name).partition_by == "group_id"]
        others = [name for name in topics if name not in grouped]
        found: list[tuple[list[str], list[int] | None]] = [(others, None)] if others else []
        if grouped:
            partitions = len(await self.log.beginning_offsets(grouped[0]))
            found.append((grouped, [crc32(group_id.encode()) % partitions]))
        return found


@dataclass(slots=True)
class Unreadable:
    """How many messages were passed over, and what was wrong with the newest."""

    count: int = 0
    last: str = ""

    def read(self, delivered: Delivered) -> Record | None:
        """The record, or None and one more in the count."""
        try:
            return delivered.record()
        except DecodeError as error:
            self.count, self.last = self.count + 1, str(error)
            return None


@asynccontextmanager
async def open_source(
    run_dir: Path | None, url: str = "", security: SecuritySection | None = None, *, archive_will_do: bool = True
) -> AsyncIterator[Source]:
    """The log at `url`, else the run's own log while it answers, else the run's archive.

    Without `run_dir` every run on the log at `url` is read. `LogUnavailable` if that log is away, or any if the archive
    will not do; `DataError` if a run has neither a log that answers nor an archive.
    """
    config = load_run(run_dir) if run_dir else None
    run = config.run.name if config else ""
    if config and not url and config.log.url.startswith("kafka:"):
        url, security = config.log.url, config.log.security
    blobs = blobs_url(config, run_dir) if config and run_dir else ""
    archived = run_dir is not None and (run_dir / "archive").is_dir()
    log = await _answering(url, security, blobs, needed=not (archived and archive_will_do))
    if log is None:
        assert run_dir is not None
        yield _archive(run_dir, run)
        return
    try:
        yield LogSource(log, url, run, run_dir / "archive" if run_dir and archived else None)
    finally:
        await log.close()


async def read_records(
    source: Source, topics: Sequence[str] = ALL_TOPICS, unreadable: Unreadable | None = None, group_id: str = ""
) -> AsyncIterator[tuple[Record, int]]:
    """Every record of the source's run that is there now, with its timestamp in ms."""
    passed_over = unreadable or Unreadable()
    async for delivered in source.messages(topics, group_id):
        record = passed_over.read(delivered)
        if record is not None and source.run in ("", record.run):
            yield record, delivered.timestamp_ms


def archived_messages(directory: Path, topics: Sequence[str] = ALL_TOPICS, group_id: str = "") -> Iterator[Delivered]:
    """The messages in a run's `archive/`; DataError if it is not there or the extra `archive` is not installed."""
    if not directory.is_dir():
        raise DataError(f"{directory}: no archive; the run has written nothing yet")
    try:
        from kat_stream.archive import GroupFilter, read_archive
    except ModuleNotFoundError as error:
        raise DataError(f"{directory}: to read it, install kat-stream[archive] ({error.name} is missing)") from error
    return read_archive(directory, topics, GroupFilter(group_id) if group_id else None)


def archived_heads(directory: Path, run: str) -> Iterator[Head]:
    """What an account needs of a run's archive, from the columns alone."""
    from kat_stream.archive import read_rows

    for topic in HEADS:
        for row in read_rows(directory, topic, columns_of(topic)):
            head = head_of_row(topic, row) if run in ("", row["run"]) else None
            if head is not None:
                yield head


def archived_records(run_dir: Path, topics: Sequence[str] = ALL_TOPICS) -> Iterator[tuple[Record, int]]:
    """The records of a run's archive with their timestamps in ms; none if there is no archive."""
    run, directory = load_run(run_dir).run.name, run_dir / "archive"
    passed_over = Unreadable()
    for delivered in archived_messages(directory, topics) if directory.is_dir() else ():
        record = passed_over.read(delivered)
        if record is not None and record.run == run:
            yield record, delivered.timestamp_ms


def archived_state(run_dir: Path, topics: Sequence[str] = ALL_TOPICS) -> RunState:
    """What a run has done, from these topics of its archive."""
    state = RunState(run=load_run(run_dir).run.name)
    for record, timestamp_ms in archived_records(run_dir, topics):
        state.apply(record, timestamp_ms)
    return state


def archived_ledger(run_dir: Path) -> Ledger:
    """The account of a run, from its archive."""
    ledger, directory = Ledger(), run_dir / "archive"
    for head in archived_heads(directory, load_run(run_dir).run.name) if directory.is_dir() else ():
        ledger.apply(head)
    return ledger


async def read_ledger(source: Source) -> Ledger:
    """The account of the source's run now."""
    ledger = Ledger()
    async for head in source.heads():
        ledger.apply(head)
    return ledger


async def _answering(url: str, security: SecuritySection | None, blobs: str, *, needed: bool) -> Log | None:
    """The started log at `url`; None if it is away and the archive can stand in for it."""
    if not url:
        return None
    log = open_log(url, security=security, blobs=blobs)
    try:
        await log.start()
    except LogUnavailable as error:
        await log.close()
        if needed:
            raise
        logger.warning("%s: reading the archive alone, which may lack what came last", error)
        return None
    return log


def _archive(run_dir: Path, run: str) -> ArchiveSource:
    if not (run_dir / "archive").is_dir():
        raise DataError(f"{run_dir}: its log lives in the run's own process, and nothing is archived yet")
    return ArchiveSource(run_dir / "archive", run)
