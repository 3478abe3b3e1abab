"""What a run is doing and has done, reduced from its records: steps, evaluation rounds, counts, rates. Pure.

Invariants: no clock (time is what the records' timestamps say) and no I/O; all but the token rate depends on the set of
records alone, so that the live view, the plot and a replay of the archive show the same numbers. What is kept of a
training rollout is some 150 bytes, for weeks of a run are held here; what is open is kept by name.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from kat_stream.observe.lineages import surviving
from kat_stream.observe.seen import Seen
from kat_stream.observe.steps import MadeStep, PackedGroup, StepView
from topics import LedgerEntry, PackedBatch, PolicyVersion, Record, Reward, RolloutRequest, TrainStep, Trajectory, Turn

WINDOW_MS = 10_000
"""Width of the window that the token rate is taken over."""
PASSED = 1.0
"""The score of a task that is solved whole."""
INT32_BYTES = 4


@dataclass(frozen=True, slots=True)
class RoundView:
    """One evaluation on held-out tasks."""

    round: int
    """The policy version (optimizer steps made) that it began at."""
    wall_s: float
    """Seconds from the run's first record to its last grading."""
    requested: int
    graded: int
    failed: int
    """Not graded because our side failed or gave up; in no pass rate."""
    passed: int

    @property
    def pass_rate(self) -> float:
        return self.passed / self.graded if self.graded else float("nan")

    @property
    def complete(self) -> bool:
        return self.requested > 0 and self.graded + self.failed >= self.requested


@dataclass(slots=True)
class _Round:
    requested: set[str] = field(default_factory=set)
    scores: dict[str, float] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    last_ms: int = 0


@dataclass(slots=True)
class RunState:
    """Feed it every record of one run with the record's timestamp."""

    run: str = ""
    first_ms: int = 0
    last_ms: int = 0
    version: str = ""
    """Newest policy version, `lineage.number`."""
    sampled_tokens: int = 0
    _requested: Seen = field(default_factory=Seen)
    _finished: Seen = field(default_factory=Seen)
    """Rollouts whose trajectory is there, or that were given up."""
    _open: set[str] = field(default_factory=set)
    """Asked for and not finished."""
    _turns: Seen = field(default_factory=Seen)
    _window: deque[tuple[int, int]] = field(default_factory=deque)
    _groups: dict[str, PackedGroup] = field(default_factory=dict)
    _steps: dict[tuple[str, int], MadeStep] = field(default_factory=dict)
    _rounds: dict[int, _Round] = field(default_factory=dict)
    _eval_round: dict[str, int] = field(default_factory=dict)
    _given_up: Seen = field(default_factory=Seen)
    _newest: tuple[int, int] = (-1, 0)

    def apply(self, record: Record, timestamp_ms: int) -> None:
        """Take in one record; a repeated one changes nothing."""
        self.run = self.run or record.run
        self.first_ms = min(self.first_ms or timestamp_ms, timestamp_ms)
        self.last_ms = max(self.last_ms, timestamp_ms)
        match record:
            case RolloutRequest():
                self._of_request(record)
            case Turn():
                self._of_turn(record, timestamp_ms)
            case Trajectory():
                self._of_trajectory(record)
            case Reward(purpose="eval"):
                self._of_eval_reward(record, timestamp_ms)
            case LedgerEntry(state="failed" | "cancelled"):
                self._give_up(record.rollout_id)
            case PackedBatch():
                self._groups[record.group_id] = PackedGroup.of(record)
            case TrainStep():
                self._steps.setdefault((record.lineage, record.step), MadeStep(record, timestamp_ms))
            case PolicyVersion():
                self._of_version(record, timestamp_ms)

    @property
    def requested(self) -> int:
        """Rollouts asked for."""
        return len(self._requested)

    @property
    def in_flight(self) -> int:
        """Rollouts asked for whose agents have not ended."""
        return len(self._open)

    @property
    def seconds(self) -> float:
        """From the first record to the last."""
        return (self.last_ms - self.first_ms) / 1000

    def tokens_per_s(self, now_ms: int | None = None) -> float:
        """Sampled tokens a second over the last WINDOW_MS before `now_ms` (default: the newest record)."""
        now = self.last_ms if now_ms is None else now_ms
        span = min(WINDOW_MS, max(1000, now - self.first_ms))
        return sum(n for at, n in self._window if now - span < at <= now) * 1000 / span

    @property
    def steps(self) -> list[StepView]:
        """The steps of the surviving lineage, in order."""
        return [step.view(self._groups, self.first_ms) for step in surviving(self._steps.values())]

    @property
    def steps_done(self) -> int:
        """Optimizer steps that the surviving lineage has made."""
        return max((step.step for step in surviving(self._steps.values())), default=0)

    @property
    def train_rollouts(self) -> int:
        """Training rollouts that have ended, whatever came of them."""
        return len(self._finished) - sum(rollout_id in self._finished for rollout_id in self._eval_round)

    @property
    def rounds(self) -> list[RoundView]:
        """The evaluation rounds, in order."""
        return [self._round(number, self._rounds[number]) for number in sorted(self._rounds)]

    def _of_request(self, record: RolloutRequest) -> None:
        if self._requested.add(record.rollout_id) and record.rollout_id not in self._finished:
            self._open.add(record.rollout_id)
        if record.purpose == "eval":
            self._rounds.setdefault(record.round, _Round()).requested.add(record.rollout_id)
            self._eval_round[record.rollout_id] = record.round
            if record.rollout_id in self._given_up:
                self._give_up(record.rollout_id)

    def _of_turn(self, record: Turn, timestamp_ms: int) -> None:
        if not self._turns.add(record.turn_id):
            return
        count = len(record.sampled_ids) // INT32_BYTES
        self.sampled_tokens += count
        self._window.append((timestamp_ms, count))
        while self._window and self.last_ms - self._window[0][0] > WINDOW_MS:
            self._window.popleft()

    def _of_trajectory(self, record: Trajectory) -> None:
        self._of_request(record.request)
        self._finish(record.rollout_id)
        if not record.gradable:
            self._give_up(record.rollout_id)

    def _of_eval_reward(self, record: Reward, timestamp_ms: int) -> None:
        round_ = self._rounds.setdefault(record.round, _Round())
        round_.last_ms = max(round_.last_ms, timestamp_ms)
        if record.status == "graded":
            round_.scores[record.rollout_id] = max(record.score, round_.scores.get(record.rollout_id, record.score))
        else:
            round_.failed.add(record.rollout_id)

    def _give_up(self, rollout_id: str) -> None:
        self._finish(rollout_id)
        self._given_up.add(rollout_id)
        if rollout_id in self._eval_round:
            self._rounds[self._eval_round[rollout_id]].failed.add(rollout_id)

    def _finish(self, rollout_id: str) -> None:
        self._finished.add(rollout_id)
        self._open.discard(rollout_id)

    def _of_version(self, record: PolicyVersion, timestamp_ms: int) -> None:
        newest = (timestamp_ms, record.number)
        if newest >= self._newest:
            self._newest, self.version = newest, record.version

    def _wall_s(self, timestamp_ms: int) -> float:
        return (timestamp_ms - self.first_ms) / 1000

    def _round(self, number: int, seen: _Round) -> RoundView:
        # A later attempt that was graded outweighs an earlier one that failed.
        failed = seen.failed - seen.scores.keys()
        passed = sum(score >= PASSED for score in seen.scores.values())
        wall_s = self._wall_s(seen.last_ms or self.first_ms)
        return RoundView(number, wall_s, len(seen.requested), len(seen.scores), len(failed), passed)
