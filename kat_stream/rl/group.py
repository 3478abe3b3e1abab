"""One finished group to one `PackedBatch`: who is trained, with which advantage, and why the others are not. Pure.

Invariant: every member gets exactly one fate, and a member has rows if and only if its fate is "packed".
Failures of our own side and stale members are outside the baseline: they say nothing about the policy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kat_stream.errors import DataError
from kat_stream.rl.advantages import ADVANTAGES, grouped
from kat_stream.rl.aggregation import turn_weights
from kat_stream.rl.registry import find
from kat_stream.rl.scores import ScoreRules, is_scored, is_taught, with_scores
from kat_stream.rl.settings import Aggregation, Level
from kat_stream.rl.staleness import Forks, is_stale, oldest
from kat_stream.trees import TrainBatch, TurnTokens, make_batch, to_arrays, turns_of
from topics import GroupMember, PackedBatch, PackedRow, Reward, Score, Trajectory


@dataclass(frozen=True, slots=True)
class GroupRules:
    """What the packer is told by the configuration."""

    staleness: int
    budget_tokens: int
    max_positions: int | None = None
    advantage: str = "group_mean"
    """A name in `rl.advantages.ADVANTAGES`."""
    aggregation: Aggregation = "trajectory"
    level: Level = "turn"
    scores: ScoreRules = field(default_factory=ScoreRules)
    distils: bool = False
    """The loss learns from a teacher, too: a member with a teacher's log-probs is kept where rewards teach nothing."""


Scores = Mapping[str, Sequence[Score]]
"""By rollout: what scorers said of it."""


@dataclass(slots=True)
class _Member:
    trajectory: Trajectory
    reward: Reward | None
    fate: str = "packed"
    reason: str = ""
    turns: tuple[TurnTokens, ...] = ()
    version: str = ""
    versions: tuple[str, ...] = ()

    @property
    def scaffold(self) -> str:
        return self.trajectory.request.task.scaffold

    def drop(self, fate: str, reason: str) -> None:
        self.fate, self.reason = fate, reason


def pack_group(
    finished: Sequence[tuple[Trajectory, Reward | None]],
    head: str,
    forks: Forks,
    rules: GroupRules,
    scores: Scores | None = None,
) -> PackedBatch:
    """`finished` holds every member of one group, with a reward where the trajectory could be graded."""
    members = [_judge(trajectory, reward, head, forks, rules) for trajectory, reward in finished]
    for member in members:
        if member.fate == "packed":
            _join_scores(member, (scores or {}).get(member.trajectory.rollout_id, ()), rules.scores)
    _compare(members, rules)
    batch = _batch_of([member for member in members if member.fate == "packed"], rules)
    first = finished[0][0]
    return PackedBatch(
        run=first.run,
        group_id=first.group_id,
        task_id=first.request.task.task_id,
        members=tuple(_record(member) for member in members),
        rows=tuple(_rows(batch)) if batch else (),
        flat_tokens=batch.flat_tokens if batch else 0,
        tree_tokens=batch.tree_tokens if batch else 0,
    )


def _judge(trajectory: Trajectory, reward: Reward | None, head: str, forks: Forks, rules: GroupRules) -> _Member:
    """What can be said of one member alone."""
    member = _Member(trajectory, reward)
    if not trajectory.gradable:
        cancelled = trajectory.outcome == "cancelled"
        member.drop("cancelled" if cancelled else "failed", trajectory.error_class or trajectory.detail)
    elif reward is None or reward.status == "failed":
        member.drop("failed", reward.error_class if reward else "no reward")
    elif not np.isfinite(reward.score):
        member.drop("failed", f"bad_reward: {reward.score}")
    else:
        _read_turns(member, head, forks, rules)
    return member


def _read_turns(member: _Member, head: str, forks: Forks, rules: GroupRules) -> None:
    try:
        member.turns = tuple(turn for turn in turns_of(member.trajectory.turns) if turn.trainable)
        spans = [span for turn in member.turns for span in turn.versions]
        if not member.turns:
            return member.drop("filtered", "no_turns")
        longest = max(len(turn.prompt_ids) + len(turn.sampled_ids) for turn in member.turns)
        if rules.max_positions is not None and longest > rules.max_positions:
            return member.drop("filtered", f"too_long: {longest} tokens, the model has {rules.max_positions} positions")
        member.version = oldest(spans, head, forks)
        member.versions = tuple(dict.fromkeys(span.version for span in spans if span.end > span.start))
    except (DataError, ValueError) as error:
        return member.drop("filtered", f"bad_turn: {error}")
    if is_stale(member.version, head, forks, rules.staleness):
        member.drop("stale", f"sampled by {member.version}, head is {head}")
    return None


def _join_scores(member: _Member, scores: Sequence[Score], rules: ScoreRules) -> None:
    try:
        member.turns = with_scores(member.turns, scores, rules)
    except DataError as error:
        return member.drop("filtered", f"bad_score: {error}")
    if rules.required and not is_scored(member.turns, rules):
        member.drop("filtered", "no_score: " + (", ".join(s.reason for s in scores if s.reason) or "none came in time"))
    return None


def _compare(members: Sequence[_Member], rules: GroupRules) -> None:
    """What can only be said of the group: equal rewards teach nothing; a teacher may."""
    alive = [member for member in members if member.fate == "packed"]
    scaffolds = [member.scaffold for member in alive]
    for member, advantage in zip(alive, _advantages(alive, rules), strict=True):
        if np.isnan(advantage) and not (rules.distils and is_taught(member.turns)):
            member.drop("filtered", "alone" if scaffolds.count(member.scaffold) == 1 else "equal_rewards")


def _advantages(members: Sequence[_Member], rules: GroupRules) -> NDArray[np.float64]:
    """float64 of each member, all of one task; NaN where the rewards of its scaffold teach nothing."""
    rewards = [member.reward.score for member in members if member.reward is not None]
    return grouped(rewards, [member.scaffold for member in members], find(ADVANTAGES, rules.advantage))


def _batch_of(packed: Sequence[_Member], rules: GroupRules) -> TrainBatch | None:
    """None if nobody is left, or if their turns contradict each other: the group closes in any case."""
    try:
        return _batch(packed, rules) if packed else None
    except DataError as error:
        for member in packed:
            member.drop("filtered", f"bad_group: {error}")
        return None


def _batch(packed: Sequence[_Member], rules: GroupRules) -> TrainBatch:
    owner = np.repeat(np.arange(len(packed)), [len(member.turns) for member in packed])
    turns = [turn for member in packed for turn in member.turns]
    lengths = [len(turn.sampled_ids) for turn in turns]
    return make_batch(
        turns,
        rollout=owner,
        # Kept for its teacher alone: no advantage.
        advantage=np.nan_to_num(_advantages(packed, rules))[owner],
        weight=turn_weights(owner, lengths, aggregation=rules.aggregation, level=rules.level),
        rollout_ids=[member.trajectory.rollout_id for member in packed],
        budget_tokens=rules.budget_tokens,
    )


def _rows(batch: TrainBatch) -> list[PackedRow]:
    return [PackedRow(**{name: array.tobytes() for name, array in row.items()}) for row in to_arrays(batch)]


def _record(member: _Member) -> GroupMember:
    return GroupMember(
        rollout_id=member.trajectory.rollout_id,
        fate=member.fate,
        reason=member.reason,
        reward=member.reward.score if member.reward else 0.0,
        turns=len(member.turns),
        tokens=sum(len(turn.sampled_ids) for turn in member.turns),
        oldest_version=member.version,
        versions=member.versions,
    )
