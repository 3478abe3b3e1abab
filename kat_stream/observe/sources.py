"""Where a viewer reads the records of a run: the live log, or the archive in the run's folder.

Invariant: a source gives only records of its run, and a message that cannot be read is passed over and counted, never
an exception: views must work on a run that went wrong.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kat_stream.errors import DataError, DecodeError, LogUnavailable
from kat_stream.log import Delivered, Log, open_log
from kat_stream.observe.ledger import Ledger
from kat_stream.observe.state import RunState
from kat_stream.runs import load_run
from topics import CATALOGUE, Record

ALL_TOPICS = tuple(topic.name for topic in CATALOGUE)
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

    def messages(self, topics: Sequence[str] = ALL_TOPICS) -> AsyncIterator[Delivered]:
        """Everything that is there now, by topic, partition and offset within each partition."""


@dataclass(slots=True)
class ArchiveSource:
    """The Parquet files of a run; nothing more comes."""

    directory: Path
    run: str

    @property
    def where(self) -> str:
        return str(self.directory)

    async def messages(self, topics: Sequence[str] = ALL_TOPICS) -> AsyncIterator[Delivered]:
        for delivered in archived_messages(self.directory, topics):
            yield delivered


@dataclass(slots=True)
class LogSource:
    """A log that is started."""

    log: Log
    where: str
    run: str

    async def messages(self, topics: Sequence[str] = ALL_TOPICS) -> AsyncIterator[Delivered]:
        async with self.log.follow(topics, start="earliest") as follower:
            async for delivered in follower.catch_up(CATCH_UP_S):
                yield delivered


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
    run_dir: Path | None, url: str = "", security: Mapping[str, object] | None = None
) -> AsyncIterator[Source]:
    """The log at `url`, else the run's own log while it answers, else the run's archive.

    Without `run_dir` every run on the log at `url` is read. `LogUnavailable` if that log is away; `DataError` if a run
    has neither a log that answers nor an archive.
    """
    config = load_run(run_dir) if run_dir else None
    run = config.run.name if config else ""
    if config and not url and config.log.url.startswith("kafka:"):
        url, security = config.log.url, config.log.security
    log = await _answering(url, security, needed=run_dir is None or not (run_dir / "archive").is_dir())
    if log is None:
        assert run_dir is not None
        yield _archive(run_dir, run)
        return
    try:
        yield LogSource(log, url, run)
    finally:
        await log.close()


async def read_records(
    source: Source, topics: Sequence[str] = ALL_TOPICS, unreadable: Unreadable | None = None
) -> AsyncIterator[tuple[Record, int]]:
    """Every record of the source's run that is there now, with its timestamp in ms."""
    passed_over = unreadable or Unreadable()
    async for delivered in source.messages(topics):
        record = passed_over.read(delivered)
        if record is not None and source.run in ("", record.run):
            yield record, delivered.timestamp_ms


def archived_messages(directory: Path, topics: Sequence[str] = ALL_TOPICS) -> Iterator[Delivered]:
    """The messages in a run's `archive/`; DataError if it is not there or the extra `archive` is not installed."""
    if not directory.is_dir():
        raise DataError(f"{directory}: no archive; the run has written nothing yet")
    try:
        from kat_stream.archive import read_archive
    except ModuleNotFoundError as error:
        raise DataError(f"{directory}: to read it, install kat-stream[archive] ({error.name} is missing)") from error
    return read_archive(directory, topics)


def archived_records(run_dir: Path, topics: Sequence[str] = ALL_TOPICS) -> Iterator[tuple[Record, int]]:
    """The records of a run's archive with their timestamps in ms; none if there is no archive."""
    run, directory = load_run(run_dir).run.name, run_dir / "archive"
    passed_over = Unreadable()
    for delivered in archived_messages(directory, topics) if directory.is_dir() else ():
        record = passed_over.read(delivered)
        if record is not None and record.run == run:
            yield record, delivered.timestamp_ms


def archived_state(run_dir: Path) -> RunState:
    """What a run has done, from its archive."""
    state = RunState(run=load_run(run_dir).run.name)
    for record, timestamp_ms in archived_records(run_dir):
        state.apply(record, timestamp_ms)
    return state


def archived_ledger(run_dir: Path) -> Ledger:
    """The account of a run, from its archive."""
    ledger = Ledger()
    for record, _ in archived_records(run_dir):
        ledger.apply(record)
    return ledger


async def _answering(url: str, security: Mapping[str, object] | None, *, needed: bool) -> Log | None:
    """The started log at `url`; None if it is away and the archive can stand in for it."""
    if not url:
        return None
    log = open_log(url, security=security)
    try:
        await log.start()
    except LogUnavailable:
        await log.close()
        if needed:
            raise
        return None
    return log


def _archive(run_dir: Path, run: str) -> ArchiveSource:
    if not (run_dir / "archive").is_dir():
        raise DataError(f"{run_dir}: its log lives in the run's own process, and nothing is archived yet")
    return ArchiveSource(run_dir / "archive", run)
