"""When to stop a stage instead of turning its topic into dead letters: a bad deploy, not bad messages.

Invariant: at most `most` messages of a window become dead letters while they are the larger share of what is handled;
the next one stops the stage and stays unfinished.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

from kat_stream.errors import TooManyDeadLetters


@dataclass(frozen=True, slots=True)
class DeadLetterLimit:
    """More than `most` dead letters and more than `share` of what was handled, within `window_s` seconds."""

    most: int = 20
    share: float = 0.5
    window_s: float = 60.0


NORMAL = DeadLetterLimit()


@dataclass(slots=True)
class DeadLetterCap:
    """Counts what one member of a stage handles."""

    limit: DeadLetterLimit = NORMAL
    _handled: deque[tuple[float, bool]] = field(default_factory=deque)
    _dead: int = 0

    def handled(self) -> None:
        """A message was handled well."""
        self._count(False)

    def bury(self, stage: str, reason: str) -> None:
        """A message becomes a dead letter; TooManyDeadLetters if it is one too many."""
        self._count(True)
        share = self._dead / len(self._handled)
        if self._dead > self.limit.most and share > self.limit.share:
            raise TooManyDeadLetters(
                f"{stage}: {self._dead} of the last {len(self._handled)} messages cannot be used, the newest because: "
                f"{reason}. The stage stops, and what it did not handle stays where it is. Look at `kat-stream "
                "dead-letters list`, mend the cause, start again, then `kat-stream dead-letters replay`"
            )

    def _count(self, dead: bool) -> None:
        now = time.monotonic()
        self._handled.append((now, dead))
        self._dead += dead
        while self._handled[0][0] < now - self.limit.window_s:
            self._dead -= self._handled.popleft()[1]
