"""What the router knows of one engine: its load and whether it answers.

Invariant: a call counts as load from the moment it is dispatched, not from the next poll, so that a burst between two
polls spreads; and it is not counted twice when the engine reports it as well.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from kat_stream.engines.client import EngineClient, Load

BACK_OFF_S = 0.25
MAX_BACK_OFF_S = 8.0
SILENT_POLLS = 3
"""So many polls in a row without any answer: it is not busy, it hangs, or its host is gone."""


@dataclass(slots=True, eq=False)
class EngineState:
    """Counts are tokens; times are those of `time.monotonic`, given by the caller."""

    engine: EngineClient
    in_flight: int = 0
    """Tokens of our own calls: prompt and what they may still sample."""
    reported: int = 0
    """Tokens that the engine holds or has waiting, of everybody's calls, at the last poll."""
    own_at_poll: int = 0
    failures: int = 0
    retry_at: float = 0.0
    answers: int = 0
    """Of polls and calls, so far; a refusal by the contract is one, too."""
    silent_polls: int = 0
    """Without an answer, since the last one."""
    lost_polls: int = 0
    """Since the last answer, also those that were refused or broken off."""
    underway: set[asyncio.Timeout] = field(default_factory=set)
    """Of our own calls: by each one of them can be ended."""

    @property
    def url(self) -> str:
        return self.engine.base_url

    @property
    def load(self) -> int:
        """Tokens on the engine now: our own, and those of others as of the last poll."""
        return self.in_flight + max(self.reported - self.own_at_poll, 0)

    def available(self, now: float) -> bool:
        return now >= self.retry_at and self.silent_polls < SILENT_POLLS

    def failed(self, now: float) -> None:
        """It refused or broke off: left alone for a time that doubles."""
        self.retry_at = now + min(BACK_OFF_S * 2**self.failures, MAX_BACK_OFF_S)
        self.failures = min(self.failures + 1, 16)

    def leave(self) -> None:
        """There is nobody: no answer will come, and nothing that ends the wait for one."""
        while self.underway:
            self.underway.pop().reschedule(0.0)

    def heard(self) -> None:
        """It answered, whatever it said."""
        self.answers += 1
        self.silent_polls = self.lost_polls = 0

    def answered(self) -> None:
        """It works: no reason to wait."""
        self.heard()
        self.failures, self.retry_at = 0, 0.0

    def polled(self, loads: Sequence[Load]) -> None:
        """Take over what the engine says about itself."""
        self.heard()
        self.reported = sum(load.num_used_tokens + load.num_waiting_uncached_tokens for load in loads)
        self.own_at_poll = self.in_flight
