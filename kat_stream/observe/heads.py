"""What the account of a run needs of each record, and nothing else: token arrays and patches are skipped, not decoded.

Owns which topics the account reads. Invariant: a head has its record's fields by the same names, so that the ledger
takes either; read from columns or from bytes it is the same head, but for a record whose own number here is beyond 64
bits, which has no column. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_type_hints

import msgspec

from kat_stream.log.base import Delivered
from topics import LedgerEntry, TrainStep, header_of, topic_named


class RequestHead(msgspec.Struct, frozen=True, kw_only=True):
    run: str
    rollout_id: str
    purpose: str = "train"


class _Asked(msgspec.Struct, frozen=True, kw_only=True):
    purpose: str = "train"


class TrajectoryHead(msgspec.Struct, frozen=True, kw_only=True):
    run: str
    rollout_id: str
    attempt: int
    outcome: str
    error_class: str = ""
    request: _Asked


class RewardHead(msgspec.Struct, frozen=True, kw_only=True):
    run: str
    rollout_id: str
    status: str = "graded"
    error_class: str = ""
    purpose: str = "train"


class _Member(msgspec.Struct, frozen=True, kw_only=True):
    rollout_id: str
    fate: str
    reason: str = ""


class BatchHead(msgspec.Struct, frozen=True, kw_only=True):
    run: str
    group_id: str
    members: tuple[_Member, ...]


Head = RequestHead | TrajectoryHead | RewardHead | BatchHead | TrainStep | LedgerEntry
HEADS: Mapping[str, type[msgspec.Struct]] = {
    "rollout.requests": RequestHead,
    "trajectories": TrajectoryHead,
    "rewards": RewardHead,
    "batches": BatchHead,
    "train.steps": TrainStep,
    "ledger": LedgerEntry,
}
"""Topic -> what the account takes from it; the last two are small and taken whole."""
_DECODERS = {topic: msgspec.msgpack.Decoder(kind) for topic, kind in HEADS.items()}


def columns_of(topic: str) -> list[str]:
    """The archive's columns that make a head; `run` is the folder's."""
    names = []
    for name, hint in get_type_hints(HEADS[topic]).items():
        inner = getattr(hint, "__struct_fields__", ())
        names += [f"{name}.{field}" for field in inner] or [name]
    return [name for name in names if name != "run"]


def head_of_row(topic: str, row: Mapping[str, Any]) -> Head | None:
    """None for a row that is no record of its topic: its columns are null, those of fields without a default too."""
    plain = _without_nulls(row)
    if any(field.required and field.name not in plain for field in msgspec.structs.fields(HEADS[topic])):
        return None
    for name in ("metrics", "positions"):  # dicts are lists of pairs in columns
        if name in plain:
            plain[name] = {pair["key"]: pair["value"] for pair in plain[name]}
    tag = {"record": header_of(topic_named(topic).record)}
    return msgspec.convert(plain | tag, HEADS[topic])  # type: ignore[return-value]


def _without_nulls(value: Any) -> Any:
    """A column that an older build did not have yet is null where its file was merged: the field has its default."""
    match value:
        case dict():
            return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
        case list():
            return [_without_nulls(inner) for inner in value]
    return value


def head_of(delivered: Delivered) -> Head | None:
    """None for bytes that are no record of their topic: a dead letter says more of them."""
    topic = delivered.position.topic
    if delivered.headers.get("record", b"").decode(errors="replace") != header_of(topic_named(topic).record):
        return None
    try:
        return _DECODERS[topic].decode(delivered.value)  # type: ignore[return-value]
    except msgspec.DecodeError:
        return None
