"""What a run is doing and has done, reduced from its records: steps, evaluation rounds, counts, rates. Pure.

Invariants: no clock (time is what the records' timestamps say) and no I/O; all but the token rate depends on the set of
records alone, so that the live view, the plot and a replay of the archive show the same numbers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean

from kat_stream.observe.lineages import surviving
from topics import LedgerEntry, PackedBatch, PolicyVersion, Record, Reward, RolloutRequest, TrainStep, Trajectory, Turn
from topics.policy_version import parse_version

WINDOW_MS = 10_000
"""Width of the window that the token rate is taken over."""
PASSED = 1.0
"""The score of a task that is solved whole."""
INT32_BYTES = 4


@dataclass(frozen=True, slots=True)
class StepView:
    """One optimizer step. NaN where the run does not say."""

    step: int
    wall_s: float
    """Seconds from the run's first record to the end of this step."""
    reward: float
    """Mean reward of the graded rollouts of the step's groups, filtered groups included."""
    loss: float
    """NaN too for a step whose groups taught nothing."""
    clip_fraction: float
    staleness_mean: float
    staleness_max: float
    """Policy versions between the oldest token of a rollout and the weights that the step began with."""
    seconds: float
    """Of the learner's work, waiting for groups not included."""
    tree_tokens: int
    flat_tokens: int
    trained: int
    filtered: int
    """Rollouts of the step's groups that were left out: equal rewards, failed or too old."""


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
class _Group:
    rewards: list[float]
    packed: dict[str, str]
    """Rollout -> oldest version of its tokens."""
    left_out: int
    tree_tokens: int
    flat_tokens: int


@dataclass(slots=True)
class RunState:
    """Feed it every record of one run with the record's timestamp."""

    run: str = ""
    first_ms: int = 0
    last_ms: int = 0
    version: str = ""
    """Newest policy version, `lineage.number`."""
    sampled_tokens: int = 0
    requested: set[str] = field(default_factory=set)
    finished: set[str] = field(default_factory=set)
    """Rollouts whose trajectory is there, or that were given up."""
    _turns: set[str] = field(default_factory=set)
    _window: deque[tuple[int, int]] = field(default_factory=deque)
    _groups: dict[str, _Group] = field(default_factory=dict)
    _steps: dict[tuple[str, int], tuple[TrainStep, int]] = field(default_factory=dict)
    _rounds: dict[int, _Round] = field(default_factory=dict)
    _eval_round: dict[str, int] = field(default_factory=dict)
    _given_up: set[str] = field(default_factory=set)
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
                self._groups[record.group_id] = _group(record)
            case TrainStep():
                self._steps.setdefault((record.lineage, record.step), (record, timestamp_ms))
            case PolicyVersion():
                self._of_version(record, timestamp_ms)

    @property
    def in_flight(self) -> int:
        """Rollouts asked for whose agents have not ended."""
        return len(self.requested - self.finished)

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
        """The steps of the surviving lineage, in order; worked out from the records at each call."""
        kept = surviving(record for record, _ in self._steps.values())
        return [self._step(record, self._steps[record.lineage, record.step][1]) for record in kept]

    @property
    def steps_done(self) -> int:
        """Optimizer steps that the surviving lineage has made."""
        return max((step.step for step in surviving(record for record, _ in self._steps.values())), default=0)

    @property
    def train_rollouts(self) -> int:
        """Training rollouts that have ended, whatever came of them."""
        return len(self.finished - self._eval_round.keys())

    @property
    def rounds(self) -> list[RoundView]:
        """The evaluation rounds, in order."""
        return [self._round(number, self._rounds[number]) for number in sorted(self._rounds)]

    def _of_request(self, record: RolloutRequest) -> None:
        self.requested.add(record.rollout_id)
        if record.purpose == "eval":
            self._rounds.setdefault(record.round, _Round()).requested.add(record.rollout_id)
            self._eval_round[record.rollout_id] = record.round
            if record.rollout_id in self._given_up:
                self._give_up(record.rollout_id)

    def _of_turn(self, record: Turn, timestamp_ms: int) -> None:
        if record.turn_id in self._turns:
            return
        self._turns.add(record.turn_id)
        count = len(record.sampled_ids) // INT32_BYTES
        self.sampled_tokens += count
        self._window.append((timestamp_ms, count))
        while self._window and self.last_ms - self._window[0][0] > WINDOW_MS:
            self._window.popleft()

    def _of_trajectory(self, record: Trajectory) -> None:
        self._of_request(record.request)
        self.finished.add(record.rollout_id)
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
        self.finished.add(rollout_id)
        self._given_up.add(rollout_id)
        if rollout_id in self._eval_round:
            self._rounds[self._eval_round[rollout_id]].failed.add(rollout_id)

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

    def _step(self, record: TrainStep, timestamp_ms: int) -> StepView:
        groups = [self._groups[group_id] for group_id in record.groups if group_id in self._groups]
        rewards = [reward for group in groups for reward in group.rewards]
        ages = _ages(record, groups)
        metrics = record.metrics
        return StepView(
            step=record.step,
            wall_s=self._wall_s(timestamp_ms),
            reward=fmean(rewards) if rewards else _metric(metrics, "reward_mean"),
            loss=_metric(metrics, "loss"),
            clip_fraction=_metric(metrics, "clip_fraction"),
            staleness_mean=fmean(ages) if ages else _metric(metrics, "staleness_mean"),
            staleness_max=max(ages) if ages else _metric(metrics, "staleness_max"),
            seconds=_metric(metrics, "step_seconds"),
            tree_tokens=sum(group.tree_tokens for group in groups),
            flat_tokens=sum(group.flat_tokens for group in groups),
            trained=len(record.trained),
            filtered=sum(group.left_out for group in groups) + len(record.stale),
        )


def _group(record: PackedBatch) -> _Group:
    graded = [m for m in record.members if m.fate not in ("failed", "cancelled")]
    packed = {m.rollout_id: m.oldest_version for m in record.members if m.fate == "packed"}
    return _Group(
        rewards=[m.reward for m in graded],
        packed=packed,
        left_out=len(record.members) - len(packed),
        tree_tokens=record.tree_tokens,
        flat_tokens=record.flat_tokens,
    )


def _ages(record: TrainStep, groups: list[_Group]) -> list[int]:
    """Steps from the oldest token of each trained rollout to the weights the step began with (version step - 1)."""
    trained = set(record.trained)
    versions = [v for group in groups for rollout_id, v in group.packed.items() if v and rollout_id in trained]
    return [max(0, record.step - 1 - parse_version(version)[1]) for version in versions]


def _metric(metrics: Mapping[str, float], name: str) -> float:
    return metrics.get(name, float("nan"))
