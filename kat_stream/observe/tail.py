"""One readable line, or one line of JSON, for each message of a topic. Pure.

Invariant: every message gives exactly one line; bytes that are no record give a line that says so, never an exception.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec

from kat_stream.errors import DataError
from kat_stream.log.base import Delivered
from kat_stream.observe.text import clock, number, one_line, plural, readable, versions
from topics import (
    DeadLetter,
    Deferred,
    GroupClosed,
    GroupMember,
    LedgerEntry,
    PackedBatch,
    PolicyVersion,
    Record,
    Reward,
    RolloutRequest,
    Score,
    Task,
    TrainStep,
    Trajectory,
    Turn,
)
from topics.turn import MARKS


def line(delivered: Delivered) -> str:
    """Time, position and what the record says: for people."""
    _, partition, offset = delivered.position
    try:
        said = describe(delivered.record())
    except DataError as error:
        said = f"unreadable: {one_line(str(error))}"
    return f"{clock(delivered.timestamp_ms)} {partition:>2}/{offset:<5} {said}"


def json_line(delivered: Delivered) -> str:
    """Position, time and the whole record: for programs. Token arrays are lists of numbers."""
    topic, partition, offset = delivered.position
    out: dict[str, Any] = {
        "topic": topic,
        "partition": partition,
        "offset": offset,
        "timestamp_ms": delivered.timestamp_ms,
        "key": None if delivered.key is None else delivered.key.decode(errors="replace"),
    }
    try:
        out["value"] = readable(delivered.record())
    except DataError as error:
        out["error"] = str(error)
    return msgspec.json.encode(out).decode()


def describe(record: Record) -> str:
    """What a record says, on one line."""
    return _WORDS[type(record)](record)


def rollouts_of(record: Record) -> tuple[str, ...]:
    """The rollouts that a record speaks of."""
    match record:
        case PackedBatch():
            return tuple(member.rollout_id for member in record.members)
        case TrainStep():
            return (*record.trained, *record.stale)
    rollout_id = getattr(record, "rollout_id", "")
    return (rollout_id,) if rollout_id else ()


def reward_of(member: GroupMember) -> str:
    """`-` for a member that was never graded: that is not 0."""
    return "-" if member.fate in ("failed", "cancelled") else f"{member.reward:g}"


def _task(r: Task) -> str:
    return f"{r.task_id}  {r.dataset}, {r.scaffold}, graded by {r.verifier.name}: {one_line(r.instruction, 70)}"


def _request(r: RolloutRequest) -> str:
    purpose = f"eval round {r.round}" if r.purpose == "eval" else "train"
    return f"{r.rollout_id}  {purpose}, {r.task.task_id}, sample {r.sample + 1} of {r.group_size}"


def _turn(r: Turn) -> str:
    if r.side in MARKS:
        return f"{r.rollout_id}  {MARKS[r.side]}"
    new, sampled = len(r.prompt_ids) // 4, len(r.sampled_ids) // 4
    side = "" if r.trainable else ", not trained"
    fork = f", fork: {r.fork}" if r.fork else ""
    said = one_line(r.content or r.tool_calls, 70)
    return f"{r.rollout_id} #{r.index}  +{new} -> {sampled} tokens, {versions(r.spans)}{side}{fork}: {said}"


def _trajectory(r: Trajectory) -> str:
    sampled = sum(len(turn.sampled_ids) for turn in r.turns) // 4
    detail = one_line(" ".join(part for part in (r.error_class, r.detail) if part), 60)
    what = f"{r.outcome}, {plural(len(r.turns), 'turn')}, {sampled} tokens, patch {len(r.patch)} B, {r.seconds:.2f} s"
    return f"{r.rollout_id}  {what}{': ' + detail if detail else ''}"


def _reward(r: Reward) -> str:
    score = f"score {r.score:g}" if r.status == "graded" else f"not graded ({r.error_class})"
    evidence = one_line(r.evidence.strip().rpartition("\n")[2], 60)
    return f"{r.rollout_id}  {score} by {r.verifier}, {r.seconds:.2f} s{': ' + evidence if evidence else ''}"


def _score(r: Score) -> str:
    if r.reason:
        return f"{r.rollout_id}  {r.kind}: no score: {one_line(r.reason)}"
    same = ", all identical" if r.identical else ""
    turns, repeats = plural(len(r.turn_ids), "turn"), plural(r.repeats, "repeat")
    return f"{r.rollout_id}  {r.scorer} {r.version}: {turns}, {repeats}{same}"


def _batch(r: PackedBatch) -> str:
    counts = Counter(member.fate for member in r.members)
    fates = ", ".join(f"{count} {fate}" for fate, count in sorted(counts.items()))
    rewards = " ".join(map(reward_of, r.members))
    return f"{r.group_id}  {fates}; rewards {rewards}; {r.tree_tokens} tree / {r.flat_tokens} flat tokens"


def _version(r: PolicyVersion) -> str:
    parent = f", left {r.parent_lineage}.{r.parent_number}" if r.parent_lineage else ""
    return f"{r.model}  {r.version}{parent}, {r.path}, sha256 {r.checksum[:12]}"


def _step(r: TrainStep) -> str:
    loss, clipped = (number(r.metrics.get(name, float("nan"))) for name in ("loss", "clip_fraction"))
    rollouts = f"{len(r.trained)} trained, {len(r.stale)} stale"
    return f"step {r.step} ({r.lineage})  {plural(len(r.groups), 'group')}, {rollouts}, loss {loss}, clipped {clipped}"


def _entry(r: LedgerEntry) -> str:
    reason = f" ({one_line(r.reason, 60)})" if r.reason else ""
    step = f" in step {r.step}" if r.step >= 0 else ""
    return f"{r.rollout_id}  {r.state}{reason}{step}{', says ' + r.stage if r.stage else ''}"


def _closed(r: GroupClosed) -> str:
    return f"{r.group_id}  closed"


def _dead(r: DeadLetter) -> str:
    where = f"{r.topic} {r.partition}/{r.offset}"
    return f"{where}  {r.stage}: {r.error_type}: {one_line(r.message, 80)} ({len(r.value)} B)"


def _deferred(r: Deferred) -> str:
    return f"{r.topic} {r.partition}/{r.offset}  {r.stage}: attempt {r.attempt} to come: {one_line(r.reason, 80)}"


_WORDS: dict[type[Record], Callable[[Any], str]] = {
    Task: _task,
    RolloutRequest: _request,
    Turn: _turn,
    Trajectory: _trajectory,
    Reward: _reward,
    Score: _score,
    PackedBatch: _batch,
    PolicyVersion: _version,
    TrainStep: _step,
    LedgerEntry: _entry,
    GroupClosed: _closed,
    DeadLetter: _dead,
    Deferred: _deferred,
}
