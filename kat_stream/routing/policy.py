"""What a routing policy is: one choice among engines that answer, one file a policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kat_stream.routing.engine_state import EngineState


class RoutingPolicy(Protocol):
    def choose(self, session: str, tokens: int, candidates: Sequence[EngineState]) -> EngineState:
        """One of `candidates` (never empty) for a call of this session that holds up to `tokens` tokens."""

    def forget(self, session: str) -> None:
        """The session ended."""
