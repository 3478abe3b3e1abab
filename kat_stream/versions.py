"""The policy versions of one run: the one reader of `policy.versions`, and what its readers ask.

Invariant: versions stand in the order of the log, which is the order in which trainers published: a fenced trainer
cannot publish, so the last one is of the living lineage. What cannot be read or is another run's is passed over.
"""

from __future__ import annotations

import logging

import anyio

from kat_stream import telemetry
from kat_stream.errors import DeadlineExceeded, DecodeError
from kat_stream.log.base import Delivered, Log
from topics import PolicyVersion, Record, parse_version

log = logging.getLogger(__name__)

TOPICS = ("policy.versions",)
Fork = tuple[str, int]


class Versions:
    """As far as they have been read."""

    def __init__(self, run: str) -> None:
        self.run = run
        self.newest: PolicyVersion | None = None
        self.forks: dict[str, Fork] = {}
        """As `rl.staleness.forks_of` gives them."""
        self._changed = anyio.Event()

    @property
    def head(self) -> str:
        """The version to sample from now; only once one is known."""
        assert self.newest is not None
        return self.newest.version

    @property
    def root(self) -> Fork:
        """The first version of the newest lineage's branch: the model as it ships; ("", -1) before any version."""
        if self.newest is None:
            return "", -1
        lineage = self.newest.lineage
        for _ in self.forks:
            lineage = self.forks.get(lineage, (lineage, 0))[0]
        return lineage, 0

    def take(self, record: Record) -> bool:
        """Take in a record; False if it is no version of this run."""
        if not isinstance(record, PolicyVersion) or record.run != self.run:
            return False
        try:
            parse_version(record.version)
        except ValueError as error:
            log.error("passed over: %s", error)
            return False
        self.newest = record
        if record.parent_lineage:
            self.forks[record.lineage] = (record.parent_lineage, record.parent_number)
        telemetry.VERSION.set(record.number)
        self._changed.set()
        self._changed = anyio.Event()
        return True

    async def load(self, the_log: Log) -> None:
        """Everything that is on the log now."""
        async with the_log.follow(TOPICS, start="earliest") as follower:
            async for delivered in follower.catch_up():
                self._read(delivered)

    async def follow(self, the_log: Log) -> None:
        """Everything, for as long as the caller lets it run."""
        async with the_log.follow(TOPICS, start="earliest") as follower:
            async for delivered in follower:
                self._read(delivered)

    async def first(self, deadline_s: float) -> PolicyVersion:
        """The newest version, waiting for the first one if there is none; another task follows meanwhile."""
        with anyio.move_on_after(deadline_s):
            while self.newest is None:
                await self._changed.wait()
        if self.newest is None:
            raise DeadlineExceeded("the first policy version from the trainer", deadline_s)
        return self.newest

    async def newer_than(self, version: PolicyVersion | None, within_s: float) -> None:
        """Until the newest is another than `version`, at most this long."""
        with anyio.move_on_after(within_s):
            while self.newest is version:
                await self._changed.wait()

    def _read(self, delivered: Delivered) -> None:
        try:
            self.take(delivered.record())
        except DecodeError as error:
            log.error("passed over: %s", error)
