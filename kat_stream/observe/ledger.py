"""The exact account of a run's rollouts, recomputed from its records. Pure: no clock, no I/O.

    requested = trained + filtered(reason) + stale + failed(class) + cancelled + evaluated + in flight(stage)

Invariants: every rollout has exactly one fate, and the fate depends on the set of records alone: any interleaving and
any repetition of them gives the same account. Where records disagree (a retried attempt, a restarted service), the word
of the later stage wins: optimizer step, then group, then grading, then rollout.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import msgspec

from kat_stream.observe.heads import BatchHead, Head, RequestHead, RewardHead, TrajectoryHead
from kat_stream.observe.lineages import surviving
from topics import LedgerEntry, PackedBatch, Record, Reward, RolloutRequest, TrainStep, Trajectory

TERMINAL = ("trained", "filtered", "stale", "failed", "cancelled", "evaluated")
STAGES = ("requested", "finished", "graded", "packed")
"""Where a rollout in flight has come to."""
_WINS = {state: rank for rank, state in enumerate((*STAGES, "cancelled", "failed", "stale", "filtered", "evaluated"))}
"""Among words of one stage the higher rank wins, so that their order does not matter."""


@dataclass(frozen=True, slots=True)
class Fate:
    """What became of one rollout: a terminal state, or `in flight` with the stage in `reason`."""

    state: str
    reason: str = ""
    step: int = -1
    """The optimizer step, if one trained or refused it."""


@dataclass(frozen=True, slots=True)
class Summary:
    """Numbers of rollouts; the dicts are by reason, error class and stage."""

    requested: int
    trained: int
    filtered: dict[str, int]
    stale: int
    failed: dict[str, int]
    cancelled: int
    evaluated: int
    in_flight: dict[str, int]

    @property
    def accounted(self) -> int:
        """The right side of the equation."""
        by_reason = (self.filtered, self.failed, self.in_flight)
        return self.trained + self.stale + self.cancelled + self.evaluated + sum(sum(d.values()) for d in by_reason)


@dataclass(slots=True)
class _Facts:
    """What the records say of one rollout, by stage; each value is a maximum, so applying twice changes nothing."""

    purpose: str = ""
    """Empty until a request or a trajectory says that it was asked for."""
    rollout: tuple[int, int, str, str] = (-1, -1, "", "")
    """Newest attempt: (attempt, rank, state, reason)."""
    grading: tuple[int, str, str] = (-1, "", "")
    """(rank, state, reason)."""
    group: tuple[int, str, str] = (-1, "", "")
    word: tuple[int, str, str] = (-1, "", "")
    """From ledger entries, which have no order among stages."""
    said: set[tuple[str, str, str, int]] = field(default_factory=set)
    """(stage, state, lineage, step) of ledger entries: a second account, which must agree with the first."""


@dataclass(slots=True)
class Ledger:
    """Feed it every record of a run; records that say nothing of a rollout's fate are ignored."""

    _facts: dict[str, _Facts] = field(default_factory=lambda: defaultdict(_Facts))
    _steps: dict[tuple[str, int], TrainStep] = field(default_factory=dict)

    def apply(self, record: Record | Head) -> None:
        """Take in one record, or its head, again or for the first time."""
        handler = _HANDLERS.get(type(record))
        if handler is not None:
            handler(self, record)

    def fates(self) -> dict[str, Fate]:
        """The one fate of every rollout that was requested, in order of its id."""
        stepped = self._stepped()
        return {
            rollout_id: stepped.get(rollout_id) or _fate(facts)
            for rollout_id, facts in sorted(self._facts.items())
            if facts.purpose
        }

    def summary(self) -> Summary:
        """The account now."""
        counts = Counter((fate.state, fate.reason) for fate in self.fates().values())
        return Summary(
            requested=sum(counts.values()),
            trained=_total(counts, "trained"),
            filtered=_by_reason(counts, "filtered"),
            stale=_total(counts, "stale"),
            failed=_by_reason(counts, "failed"),
            cancelled=_total(counts, "cancelled"),
            evaluated=_total(counts, "evaluated"),
            in_flight={stage: counts["in flight", stage] for stage in STAGES if counts["in flight", stage]},
        )

    def rollouts(self, state: str, reason: str = "") -> list[str]:
        """The rollouts behind one number, in order; without a reason those of every reason."""
        return [
            rollout_id
            for rollout_id, fate in self.fates().items()
            if fate.state == state and (not reason or fate.reason == reason)
        ]

    def second_account(self) -> dict[str, int]:
        """Rollouts by the last thing that the topic `ledger` says of them; what it says nothing of is not counted."""
        last = []
        for facts in self._facts.values():
            states = {state for _, state, _, _ in facts.said if state in _WINS or state == "trained"}
            if facts.purpose and states:
                last.append("trained" if "trained" in states else max(states, key=lambda state: _WINS[state]))
        return dict(sorted(Counter(last).items()))

    def check(self) -> list[str]:
        """What is wrong with the account, a sentence each; empty if it closes."""
        problems = [f"{rollout_id}: has a fate but was never requested" for rollout_id in self._unrequested()]
        problems += [f"{rollout_id}: trained in steps {steps}" for rollout_id, steps in self._trained_twice()]
        summary = self.summary()
        if summary.requested != summary.accounted:
            problems.append(f"{summary.requested} requested, but {summary.accounted} accounted for")
        return problems + self.disagreements()

    def disagreements(self) -> list[str]:
        """Where the topic `ledger` and the stages' own records tell different stories; a sentence each."""
        trained = {one: (step.lineage, step.step) for step in surviving(self._steps.values()) for one in step.trained}
        found = []
        for rollout_id, facts in sorted(self._facts.items()):
            found += [f"{rollout_id}: {what}" for what in self._differs(rollout_id, facts, trained.get(rollout_id))]
        return found

    def _differs(self, rollout_id: str, facts: _Facts, trained: tuple[str, int] | None) -> Iterator[str]:
        packer = {state for stage, state, _, _ in facts.said if stage == "packer"}
        # A batch that cannot be used is filtered before any step.
        words = {said[1:] for said in facts.said if said[0] == "trainer" and said[1] != "filtered"}
        for state, lineage, step in sorted(words):
            made = self._steps.get((lineage, step))
            if made is None or rollout_id not in (made.trained if state == "trained" else made.stale):
                yield f"ledger says {state} in step {step} of lineage {lineage}, train.steps does not"
        if trained is not None and ("trained", *trained) not in words:
            yield f"train.steps says trained in step {trained[1]} of lineage {trained[0]}, ledger does not"
        decided = facts.group[1] or facts.grading[1]
        if packer and decided not in packer:
            yield f"ledger says {' and '.join(sorted(packer))}, {_source(facts)} says {decided or 'nothing'}"
        if facts.group[1] and not packer and not words:
            yield f"batches says {facts.group[1]}, ledger says nothing"

    def _of_request(self, record: RolloutRequest | RequestHead) -> None:
        self._facts[record.rollout_id].purpose = record.purpose

    def _of_trajectory(self, record: Trajectory | TrajectoryHead) -> None:
        # A trajectory carries its request: the account holds where retention has eaten the request itself.
        facts = self._facts[record.rollout_id]
        facts.purpose = record.request.purpose
        state = {"infra_error": "failed", "cancelled": "cancelled"}.get(record.outcome, "finished")
        reason = record.error_class or record.outcome if state == "failed" else ""
        facts.rollout = max(facts.rollout, (record.attempt, _WINS[state], state, reason))

    def _of_reward(self, record: Reward | RewardHead) -> None:
        facts = self._facts[record.rollout_id]
        if record.status == "failed":
            word = (0, "failed", record.error_class or "verifier")
        else:
            # A second verifier that could grade outranks a first one that could not.
            word = (1, "evaluated" if record.purpose == "eval" else "graded", "")
        facts.grading = max(facts.grading, word)

    def _of_batch(self, record: PackedBatch | BatchHead) -> None:
        for member in record.members:
            facts = self._facts[member.rollout_id]
            facts.group = max(facts.group, _word(member.fate, member.reason))

    def _of_step(self, record: TrainStep) -> None:
        self._steps[record.lineage, record.step] = record
        for rollout_id in (*record.trained, *record.stale):
            self._facts.setdefault(rollout_id, _Facts())

    def _of_entry(self, record: LedgerEntry) -> None:
        # `trained` is left to train.steps, which alone knows whether the step is on the surviving branch.
        facts = self._facts[record.rollout_id]
        facts.said.add((record.stage, record.state, record.lineage, record.step))
        if record.state not in ("requested", "trained"):
            facts.word = max(facts.word, _word(record.state, record.reason))

    def _stepped(self) -> dict[str, Fate]:
        fates: dict[str, Fate] = {}
        for step in surviving(self._steps.values()):
            for rollout_id in step.stale:
                fates.setdefault(rollout_id, Fate("stale", "", step.step))
            for rollout_id in step.trained:
                fates[rollout_id] = Fate("trained", "", step.step)
        return fates

    def _unrequested(self) -> list[str]:
        return sorted(rollout_id for rollout_id, facts in self._facts.items() if not facts.purpose)

    def _trained_twice(self) -> list[tuple[str, list[int]]]:
        steps: dict[str, list[int]] = defaultdict(list)
        for step in surviving(self._steps.values()):
            for rollout_id in step.trained:
                steps[rollout_id].append(step.step)
        return sorted((rollout_id, made) for rollout_id, made in steps.items() if len(made) > 1)


_HANDLERS: dict[type[msgspec.Struct], Callable[[Ledger, Record | Head], None]] = {
    RolloutRequest: Ledger._of_request,  # type: ignore[dict-item]
    Trajectory: Ledger._of_trajectory,  # type: ignore[dict-item]
    Reward: Ledger._of_reward,  # type: ignore[dict-item]
    PackedBatch: Ledger._of_batch,  # type: ignore[dict-item]
    TrainStep: Ledger._of_step,  # type: ignore[dict-item]
    LedgerEntry: Ledger._of_entry,  # type: ignore[dict-item]
    RequestHead: Ledger._of_request,  # type: ignore[dict-item]
    TrajectoryHead: Ledger._of_trajectory,  # type: ignore[dict-item]
    RewardHead: Ledger._of_reward,  # type: ignore[dict-item]
    BatchHead: Ledger._of_batch,  # type: ignore[dict-item]
}


def _source(facts: _Facts) -> str:
    return "batches" if facts.group[1] else "rewards"


def _word(state: str, reason: str) -> tuple[int, str, str]:
    """A reason such as `too_long: 812 tokens` is counted by its head; a state that nobody knows says nothing."""
    if state not in _WINS:
        return -1, "", ""
    return _WINS[state], state, reason.partition(":")[0]


def _fate(facts: _Facts) -> Fate:
    """The fate of a rollout that no surviving step names: the latest stage's word that is final, else where it is."""
    rollout = facts.rollout[1:]
    if facts.group[1] == "packed" and facts.word[1] == "filtered":
        return _closed(*facts.word[1:])  # the trainer could not read the batch
    grading = (_WINS[facts.grading[1]], *facts.grading[1:]) if facts.grading[1] else (-1, "", "")
    for _, state, reason in (facts.group, grading):
        if state in TERMINAL or state == "packed":
            return _closed(state, reason)
    furthest = max(facts.word, rollout, grading)
    return _closed(furthest[1] or "requested", furthest[2])


def _closed(state: str, reason: str) -> Fate:
    """The equation splits only filtered and failed by reason."""
    if state in STAGES:
        return Fate("in flight", state)
    return Fate(state, reason if state in ("filtered", "failed") else "")


def _total(counts: Counter[tuple[str, str]], state: str) -> int:
    return sum(n for (s, _), n in counts.items() if s == state)


def _by_reason(counts: Counter[tuple[str, str]], state: str) -> dict[str, int]:
    return {reason: n for (s, reason), n in sorted(counts.items()) if s == state}
