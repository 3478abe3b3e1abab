"""`batches`: one group, tree-packed and ready for the learner. Written by the packer; read by the trainer.

A group that teaches nothing (equal rewards, all failed, too old) is written too, with no rows: every requested
group appears exactly once, so the trainer's step counts groups and the ledger closes.
`PackedRow` arrays share the row's length N; `index` arrays point into it.
"""

from __future__ import annotations

import msgspec

from topics.record import Record


class PackedRow(msgspec.Struct, frozen=True, kw_only=True):
    """Several token trees in DFS order. visible(q, k) <=> k <= q < end[k]; pos is the depth on the path."""

    ids: bytes
    """int32[N] token ids."""
    pos: bytes
    """int32[N] position on the token's own path."""
    parent: bytes
    """int32[N] index of the parent token; -1 for a root."""
    end: bytes
    """int32[N] one past the last descendant."""
    turn_len: bytes
    """int32[M] sampled tokens of each turn in this row."""
    index: bytes
    """int32[sum turn_len] where each turn's sampled tokens lie in the row, turns one after the other."""
    member: bytes
    """int32[M] which member of the group each turn belongs to, counted among those with fate "packed"."""
    logprobs: bytes
    """float32[sum turn_len] behaviour log-probabilities."""
    advantage: bytes
    """float32[M] of each turn."""
    weight: bytes
    """float32[M] share of each turn in its trajectory's mean (1 / number of trainable turns)."""
    scored_logprobs: bytes = b""
    """float32[sum turn_len] behaviour log-probabilities averaged over repeated prefills (MCLA), NaN for a token that
    was not scored by the version that sampled it; empty: none was."""
    teacher_logprobs: bytes = b""
    """float32[sum turn_len] a teacher's log-probabilities of the sampled tokens, NaN without; empty: no teacher."""
    routed_experts: bytes = b""
    """uint16[N, hidden layers * experts a token]: where the engine routed each token, 65535 where it did not say; a
    token of several turns has the routing of the first one that sampled it, else prefilled it; empty: not recorded."""


class GroupMember(msgspec.Struct, frozen=True, kw_only=True):
    """One rollout of the group and what became of it."""

    rollout_id: str
    fate: str
    """packed | filtered | stale | failed | cancelled"""
    reason: str = ""
    reward: float = 0.0
    turns: int = 0
    tokens: int = 0
    """Sampled tokens."""
    oldest_version: str = ""
    """The oldest one when the group was packed."""
    versions: tuple[str, ...] = ()
    """Every version that sampled a trainable token: which is the oldest may change when a lineage is left behind."""


class PackedBatch(Record, frozen=True, kw_only=True, tag="PackedBatch/1"):
    group_id: str
    task_id: str
    members: tuple[GroupMember, ...]
    rows: tuple[PackedRow, ...] = ()
    flat_tokens: int = 0
    """Tokens that training each path apart would have computed."""
    tree_tokens: int = 0
    """Tokens that training the tree computes."""
