"""Fabricated runs: the records that a real run would write, with known fates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from kat_stream.log.base import Delivered, Position
from kat_stream.log.message import seal
from tests.unit import records
from topics import (
    Environment,
    GroupMember,
    LedgerEntry,
    PackedBatch,
    PackedRow,
    PolicyVersion,
    Record,
    Reward,
    RolloutRequest,
    Sampling,
    Task,
    TrainStep,
    Trajectory,
    Turn,
    VerifierSpec,
    partition_of,
)
from topics.record import pack_floats, pack_ints

RUN = "demo"
START_MS = 1_790_000_000_000
TRAIN_FATES = (
    "trained",
    "stale in the step",
    "stale in the group",
    "filtered",
    "failed rollout",
    "failed entry",
    "failed grading",
    "cancelled",
    "packed",
    "graded",
    "finished",
    "requested",
)
EVAL_FATES = ("passed", "not passed", "failed grading", "failed entry", "cancelled", "requested")
EXPECTED = {
    "trained": ("trained", ""),
    "stale in the step": ("stale", ""),
    "stale in the group": ("stale", ""),
    "filtered": ("filtered", "equal_rewards"),
    "failed rollout": ("failed", "SandboxUnavailable"),
    "failed entry": ("failed", "DeadlineExceeded"),
    "failed grading": ("failed", "VerifierError"),
    "cancelled": ("cancelled", ""),
    "packed": ("in flight", "packed"),
    "graded": ("in flight", "graded"),
    "finished": ("in flight", "finished"),
    "requested": ("in flight", "requested"),
    "passed": ("evaluated", ""),
    "not passed": ("evaluated", ""),
}
MEMBER_FATES = {
    "trained": ("packed", ""),
    "packed": ("packed", ""),
    "stale in the step": ("packed", ""),
    "stale in the group": ("stale", "sampled by a.0, head is a.5"),
    "filtered": ("filtered", "equal_rewards"),
    "failed rollout": ("failed", "SandboxUnavailable"),
    "failed grading": ("failed", "VerifierError"),
    "failed entry": ("failed", "DeadlineExceeded"),
    "cancelled": ("cancelled", ""),
}
OPEN = ("requested", "finished", "graded")
"""A group with such a member is not packed yet."""


def task(name: str = "mend/rename-17") -> Task:
    return Task(
        run=RUN,
        task_id=name,
        dataset="mend:train",
        environment=Environment(files="mend:0/rename-17"),
        instruction="tests/test.sh fails.\nMend it.",
        verifier=VerifierSpec(name="harbor"),
    )


def request(group_id: str, sample: int, size: int, purpose: str = "train", round_: int = 0) -> RolloutRequest:
    return msgspec.structs.replace(
        records.request(group_id, sample, size, purpose),
        run=RUN,
        task=task(),
        sampling=Sampling(max_new_tokens=40, max_turns=6, max_context=1024),
        deadline_unix_s=START_MS / 1000 + 60,
        round=round_,
    )


def turns(asked: RolloutRequest, version: str = "a.0") -> tuple[Turn, ...]:
    def turn(index: int, prompt: list[int], sampled: list[int], content: str, prefix: int) -> Turn:
        return records.turn(
            asked,
            prompt,
            sampled,
            version=version,
            name=f"{asked.rollout_id}-{index}",
            session_id=f"s-{asked.rollout_id}",
            index=index,
            parent=f"{asked.rollout_id}-{index - 1}" if index else "",
            prefix_len=prefix,
            content=content,
            engine="engine-0",
            cached_tokens=prefix,
            seconds=0.25,
        )

    return (turn(0, [1, 2, 3, 4], [10, 11, 2], "mv a b", 0), turn(1, [5, 6], [12, 2], "submit", 7))


def trajectory(asked: RolloutRequest, outcome: str = "submitted", error: str = "", attempt: int = 1) -> Trajectory:
    return records.trajectory(
        asked,
        *(turns(asked) if outcome == "submitted" else ()),
        outcome=outcome,
        attempt=attempt,
        error_class=error,
        detail="no space left" if error else "",
        patch=b"--- a/x\n+++ b/x\n@@ -1 +1 @@\n-1\n+2\n" if outcome == "submitted" else b"",
        seconds=1.5,
        sandbox_s=0.5,
    )


def reward(asked: RolloutRequest, score: float, status: str = "graded") -> Reward:
    return records.reward(
        asked,
        score,
        status="graded" if status == "graded" else "failed",
        evidence="1 passed\n",
        error_class="" if status == "graded" else "VerifierError",
        round=asked.round,
        seconds=0.2,
    )


def entry(asked: RolloutRequest, state: str, reason: str = "", stage: str = "rollout") -> LedgerEntry:
    return LedgerEntry(
        run=RUN,
        group_id=asked.group_id,
        rollout_id=asked.rollout_id,
        state=state,  # type: ignore[arg-type]
        reason=reason,
        stage=stage,
    )


def batch(group_id: str, members: Sequence[GroupMember]) -> PackedBatch:
    packed = [m for m in members if m.fate == "packed"]
    # Two turns a member; the packed ones learn from their distance to the mean reward.
    mean = sum(m.reward for m in packed) / max(len(packed), 1)
    owners = [place for place in range(len(packed)) for _ in range(2)]
    none = pack_ints([])
    row = PackedRow(
        ids=none,
        pos=none,
        parent=none,
        end=none,
        turn_len=none,
        index=none,
        logprobs=none,
        member=pack_ints(owners),
        advantage=pack_floats([packed[place].reward - mean for place in owners]),
        weight=pack_floats([0.5] * len(owners)),
    )
    return PackedBatch(
        run=RUN,
        group_id=group_id,
        task_id="mend/rename-17",
        members=tuple(members),
        rows=(row,) if packed else (),
        flat_tokens=40 * len(packed),
        tree_tokens=25 * len(packed),
    )


def step(
    number: int,
    groups: Sequence[str],
    trained: Sequence[str],
    stale: Sequence[str] = (),
    *,
    lineage: str = "a",
    unix_s: float = 0.0,
) -> TrainStep:
    ratios = {"mean_ratio": 1.01, "clip_fraction": 0.05, "log_ratio_abs": 0.02}
    return TrainStep(
        run=RUN,
        lineage=lineage,
        step=number,
        metrics={"loss": -0.01 * number, "step_seconds": 0.8, **ratios},
        groups=tuple(groups),
        trained=tuple(trained),
        stale=tuple(stale),
        unix_s=unix_s or START_MS / 1000 + number,
    )


def said(number: int, asked: Sequence[RolloutRequest], trained: Sequence[str], stale: Sequence[str]) -> list[Record]:
    """What the trainer says in the ledger with its step."""
    names = {**dict.fromkeys(trained, "trained"), **dict.fromkeys(stale, "stale")}
    return [
        msgspec.structs.replace(entry(one, names[one.rollout_id], stage="trainer"), step=number, lineage="a")
        for one in asked
        if one.rollout_id in names
    ]


def version(number: int, lineage: str = "a") -> PolicyVersion:
    path = f"weights/{lineage}.{number}"
    return PolicyVersion(run=RUN, model="policy", lineage=lineage, number=number, path=path, checksum="ab" * 32)


@dataclass(slots=True)
class FabricatedRun:
    """Records with their timestamps, in the order of a run, and what the account must say."""

    records: list[tuple[Record, int]] = field(default_factory=list)
    expected: Counter[tuple[str, str]] = field(default_factory=Counter)
    by_fate: dict[str, list[str]] = field(default_factory=dict)

    def add(self, *records: Record) -> None:
        for record in records:
            self.records.append((record, START_MS + 100 * len(self.records)))

    def delivered(self) -> list[Delivered]:
        """As a log would hand them out."""
        offsets: Counter[tuple[str, int]] = Counter()
        out = []
        for record, timestamp_ms in self.records:
            message = seal(record)
            place = (message.topic, partition_of(record))
            position = Position(*place, offsets[place])
            offsets[place] += 1
            out.append(Delivered(position, message.key, message.value, dict(message.headers), timestamp_ms))
        return out

    def train_group(self, number: int, fates: Sequence[str]) -> None:
        group_id = f"{RUN}-t{number:06d}"
        asked = [request(group_id, sample, len(fates)) for sample in range(len(fates))]
        self.add(*asked, *(entry(one, "requested", stage="sampler") for one in asked))
        for one, fate in zip(asked, fates, strict=True):
            self._expect(one, fate)
            self.add(*_rollout(one, fate))
        if any(fate in OPEN for fate in fates):
            return
        members = [_member(one, fate) for one, fate in zip(asked, fates, strict=True)]
        decided = [entry(one, m.fate, m.reason, "packer") for one, m in zip(asked, members, strict=True)]
        self.add(batch(group_id, members), *decided)
        trained = [one.rollout_id for one, fate in zip(asked, fates, strict=True) if fate == "trained"]
        stale = [one.rollout_id for one, fate in zip(asked, fates, strict=True) if fate == "stale in the step"]
        if trained or stale:
            self.add(step(number, [group_id], trained, stale), version(number), *said(number, asked, trained, stale))

    def evaluation(self, round_: int, fates: Sequence[str]) -> None:
        asked = [request(f"{RUN}-e{round_:05d}-{i:04d}", 0, 1, "eval", round_) for i in range(len(fates))]
        self.add(*asked)
        for one, fate in zip(asked, fates, strict=True):
            self._expect(one, fate)
            self.add(*_rollout(one, fate))

    def _expect(self, asked: RolloutRequest, fate: str) -> None:
        self.expected[EXPECTED[fate]] += 1
        self.by_fate.setdefault(fate, []).append(asked.rollout_id)


def _member(asked: RolloutRequest, fate: str) -> GroupMember:
    state, reason = MEMBER_FATES[fate]
    score = float(asked.sample % 2) if state != "failed" else 0.0
    return GroupMember(
        rollout_id=asked.rollout_id, fate=state, reason=reason, reward=score, turns=2, tokens=5, oldest_version="a.0"
    )


def _rollout(asked: RolloutRequest, fate: str) -> list[Record]:
    """What rollout and verifier write of one rollout."""
    if fate == "requested":
        return []
    if fate == "failed entry":
        return [entry(asked, "failed", "DeadlineExceeded: nothing within 60 s")]
    if fate == "failed rollout":
        return [trajectory(asked, "infra_error", "SandboxUnavailable")]
    if fate == "cancelled":
        return [trajectory(asked, "cancelled")]
    done: list[Record] = [*turns(asked), trajectory(asked)]
    if fate == "finished":
        return done
    score = {"passed": 1.0, "not passed": 0.0}.get(fate, float(asked.sample % 2))
    return [*done, reward(asked, score, "failed" if fate == "failed grading" else "graded")]


def small() -> FabricatedRun:
    """Two steps between two evaluations, with every fate once."""
    run = FabricatedRun()
    run.add(task(), version(0))
    run.evaluation(0, ["passed", "not passed", "not passed", "failed grading"])
    run.train_group(1, ["trained", "trained", "failed rollout", "stale in the step"])
    run.train_group(2, ["trained", "trained", "cancelled", "stale in the group"])
    run.train_group(3, ["filtered", "filtered"])
    run.train_group(4, ["graded", "requested"])
    run.evaluation(2, ["passed", "passed", "passed", "not passed"])
    return run
