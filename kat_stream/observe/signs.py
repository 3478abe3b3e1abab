"""Whether a run goes on: something of it was asked for, graded or ended since somebody looked last.

Owns its places in three topics of small records. Invariant: only what this run wrote is a sign, whoever else writes to
the broker; looking joins no group and moves no offset.
"""

from __future__ import annotations

from kat_stream.errors import DecodeError
from kat_stream.log.base import Delivered, Log

SIGNS = ("rollout.requests", "rewards", "ledger")
READ_S = 60.0


class Signs:
    """`since_last_look` of one run on one log."""

    def __init__(self, log: Log, run: str) -> None:
        self._log, self._run = log, run
        self._places: dict[tuple[str, int], int] | None = None

    async def since_last_look(self) -> bool:
        """Whether there was one; True at the first look, which only takes its places. DeadlineExceeded; LogError."""
        before, self._places = self._places, await self._ends()
        if before is None:
            return True
        if before == self._places:
            return False
        async with self._log.follow(SIGNS, start=before) as follower:
            async for delivered in follower.catch_up(READ_S):
                if self._ours(delivered):
                    return True
        return False

    async def _ends(self) -> dict[tuple[str, int], int]:
        return {(topic, number): end for topic in SIGNS for number, end in (await self._log.end_offsets(topic)).items()}

    def _ours(self, delivered: Delivered) -> bool:
        try:
            return delivered.record().run == self._run
        except DecodeError:  # whose it is cannot be said; its readers bury it
            return False
