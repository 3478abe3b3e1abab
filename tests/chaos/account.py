"""The account of a run from its topics alone, made without kat_stream.observe, against which it is compared. Pure.

Invariant: the verdict depends only on what is on the topics in the order of their offsets. The surviving lineage is
walked from the last policy version on the log to its parents; a rollout is closed when a surviving step names it or its
group's batch gives it an end; the age of a token is counted along that walk.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from kat_stream.log import Delivered
from kat_stream.observe.ledger import Fate
from topics import DeadLetter, PackedBatch, PolicyVersion, RolloutRequest, TrainStep, Trajectory, Turn

BOUND = 2
"""Staleness bound of the chaos run (tests/chaos/system.py)."""
ENDS = ("filtered", "stale", "failed", "cancelled")


@dataclass(slots=True)
class Verdict:
    """Ids of what is wrong, by kind; empty everywhere is what must come out."""

    lost: list[str] = field(default_factory=list)
    """Asked for and never closed."""
    twice: list[str] = field(default_factory=list)
    """Trained in two steps of the surviving lineage."""
    packed_twice: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """Packed before the trainer's position, in no surviving step."""
    too_old: list[str] = field(default_factory=list)
    """Trained with a token that was older than the bound."""
    missing_steps: list[str] = field(default_factory=list)
    dead_letters: list[str] = field(default_factory=list)
    ledger: list[str] = field(default_factory=list)
    """Where kat_stream.observe.ledger says something else."""

    @property
    def exact(self) -> bool:
        return not self.ledger

    @property
    def ok(self) -> bool:
        return not self.problems()

    def problems(self) -> list[str]:
        return [f"{kind}: {', '.join(ids[:20])}" for kind, ids in self._kinds().items() if ids]

    def _kinds(self) -> dict[str, list[str]]:
        return {
            "lost": self.lost,
            "trained twice": self.twice,
            "packed twice": self.packed_twice,
            "packed but skipped": self.skipped,
            "trained beyond the staleness bound": self.too_old,
            "steps missing in the surviving lineage": self.missing_steps,
            "dead letters": self.dead_letters,
            "the ledger disagrees": self.ledger,
        }


@dataclass(slots=True)
class Account:
    """What is on the topics."""

    asked: set[str] = field(default_factory=set)
    versions: list[PolicyVersion] = field(default_factory=list)
    steps: dict[tuple[str, int], TrainStep] = field(default_factory=dict)
    batches: list[tuple[int, int, PackedBatch]] = field(default_factory=list)
    """(partition, offset, batch)."""
    turns: dict[str, list[tuple[Turn, ...]]] = field(default_factory=dict)
    """Of each trajectory of a rollout: of one that ran twice the batch does not say which counts."""
    dead: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, messages: Iterable[Delivered]) -> Account:
        account = cls()
        for message in messages:
            account._take(message)
        return account

    def _take(self, message: Delivered) -> None:
        record = message.record()
        match record:
            case RolloutRequest(rollout_id=rollout_id):
                self.asked.add(rollout_id)
            case PolicyVersion():
                self.versions.append(record)
            case TrainStep():
                self.steps[record.lineage, record.step] = record
            case PackedBatch():
                self.batches.append((message.position.partition, message.position.offset, record))
            case Trajectory():
                self.turns.setdefault(record.rollout_id, []).append(record.turns)
            case DeadLetter():
                self.dead.append(f"{record.stage} {record.topic}[{record.partition}]@{record.offset}: {record.message}")

    def line(self, lineage: str) -> dict[str, float]:
        """Lineage -> last version number that counts, from this lineage to its first ancestor."""
        parents = {version.lineage: (version.parent_lineage, version.parent_number) for version in self.versions}
        limits: dict[str, float] = {}
        limit = float("inf")
        while lineage and lineage not in limits:
            limits[lineage] = limit
            lineage, left_at = parents.get(lineage, ("", -1))
            limit = min(limit, left_at)
        return limits

    def survivors(self) -> list[TrainStep]:
        """The steps of the line that the last policy version ends."""
        limits = self.line(self.versions[-1].lineage) if self.versions else {}
        kept = [step for (lineage, number), step in self.steps.items() if number <= limits.get(lineage, -1)]
        return sorted(kept, key=lambda step: step.step)

    def fates(self) -> dict[str, str]:
        """Rollout -> its end, for all that have one."""
        fates = {
            member.rollout_id: member.fate
            for _, _, batch in reversed(self.batches)
            for member in batch.members
            if member.fate in ENDS
        }
        for step in self.survivors():
            fates |= dict.fromkeys(step.stale, "stale") | dict.fromkeys(step.trained, "trained")
        return fates

    def open_of(self, asked: set[str]) -> set[str]:
        return asked - self.fates().keys()

    def judge(self, asked: set[str], ledger: Mapping[str, Fate]) -> Verdict:
        """`asked`: what must be closed by now; `ledger`: what the ledger makes of the same records."""
        survivors = self.survivors()
        trained = Counter(rollout for step in survivors for rollout in step.trained)
        packed = Counter(group for group in (batch.group_id for _, _, batch in self.batches))
        numbers = Counter(step.step for step in survivors)
        newest = max(numbers, default=0)
        return Verdict(
            lost=sorted(self.open_of(asked)),
            twice=sorted(rollout for rollout, count in trained.items() if count > 1),
            packed_twice=sorted(group for group, count in packed.items() if count > 1),
            skipped=sorted(self._skipped(survivors)),
            too_old=sorted(self._too_old(survivors)),
            missing_steps=[str(number) for number in range(1, newest + 1) if numbers[number] != 1],
            dead_letters=self.dead,
            ledger=sorted(self._disagreement(asked, ledger)),
        )

    def _skipped(self, survivors: list[TrainStep]) -> Iterable[str]:
        """Groups before the last step's positions that no step took, and packed members that their step forgot."""
        positions = survivors[-1].positions if survivors else {}
        step_of: dict[str, list[TrainStep]] = defaultdict(list)
        for step in survivors:
            for group in step.groups:
                step_of[group].append(step)
        for partition, offset, batch in self.batches:
            if offset >= positions.get(str(partition), 0):
                continue
            if len(step_of[batch.group_id]) != 1:
                yield f"{batch.group_id} (in {len(step_of[batch.group_id])} steps)"
                continue
            named = {*step_of[batch.group_id][0].trained, *step_of[batch.group_id][0].stale}
            packed = {member.rollout_id for member in batch.members if member.fate == "packed"}
            yield from packed - named

    def _too_old(self, survivors: list[TrainStep]) -> Iterable[str]:
        for step in survivors:
            limits = self.line(step.lineage)
            for rollout in step.trained:
                lives = [_too_old_in(turns, step.step - 1, limits) for turns in self.turns.get(rollout, [()])]
                if all(lives):
                    yield f"{rollout} (step {step.lineage}.{step.step}: {lives[0]})"

    def _disagreement(self, asked: set[str], ledger: Mapping[str, Fate]) -> Iterable[str]:
        mine = self.fates()
        for rollout in asked:
            state = ledger[rollout].state if rollout in ledger else "unknown"
            if state != mine.get(rollout, "in flight"):
                yield f"{rollout} is {mine.get(rollout, 'in flight')}, not {state}"
        if ledger.keys() != self.asked:
            yield f"{len(ledger)} rollouts in the ledger, {len(self.asked)} were asked for"


def _too_old_in(turns: Iterable[Turn], head: int, limits: Mapping[str, float]) -> list[str]:
    """What must not be trained in one trajectory; empty if it may be trained."""
    spans = [span for turn in turns if turn.trainable for span in turn.spans]
    old = [span.version for span in spans if _age(span.version, head, limits) > BOUND]
    return old if spans else ["no turns on the log"]


def _age(version: str, head: int, limits: Mapping[str, float]) -> float:
    """Steps between the version and the head; infinite on an abandoned branch."""
    lineage, _, number = version.rpartition(".")
    return head - int(number) if int(number) <= limits.get(lineage, -1) else float("inf")
