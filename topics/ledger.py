"""`ledger`: the newest known fate of each requested rollout (compacted). Written by whoever decides the fate."""

from __future__ import annotations

from typing import Literal

from topics.record import Record

State = Literal["requested", "finished", "packed", "filtered", "stale", "failed", "cancelled", "trained", "evaluated"]


class LedgerEntry(Record, frozen=True, kw_only=True, tag="LedgerEntry/1"):
    group_id: str
    rollout_id: str
    state: State
    reason: str = ""
    step: int = -1
    lineage: str = ""
    stage: str = ""
