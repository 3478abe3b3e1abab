"""Session-sticky, else least loaded: a session stays where its prefix is cached, as long as that engine answers.

Invariant: ties are broken at random; a fixed order would send all of a quiet fleet's work to its first engine.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from kat_stream.routing.engine_state import EngineState


class StickyLeastLoaded:
    def __init__(self) -> None:
        self._home: dict[str, EngineState] = {}

    def choose(self, session: str, tokens: int, candidates: Sequence[EngineState]) -> EngineState:
        """The session's engine if it is among the candidates, else the one with the fewest tokens."""
        home = self._home.get(session)
        if home is None or home not in candidates:
            least = min(state.load for state in candidates)
            home = random.choice([state for state in candidates if state.load == least])
            self._home[session] = home
        return home

    def forget(self, session: str) -> None:
        self._home.pop(session, None)
