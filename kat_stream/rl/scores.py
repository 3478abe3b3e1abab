"""What scorers said of a rollout, joined to its turns: averaged repeats (MCLA) and a teacher's log-probs. Pure.

Invariant: a token has an averaged log-prob only from the weight version that sampled it; every other one is NaN and
keeps the log-prob that was recorded while sampling. Repeats that are identical to the bit are no samples: they count
as one, which is what their average is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kat_stream.errors import DataError
from kat_stream.rl.mcla import Reduce, average
from kat_stream.trees import TurnTokens
from topics import Score

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class ScoreRules:
    """Which scores a run asks for, and what becomes of a rollout that lacks them."""

    repeats: bool = False
    """Wanted: averaged behaviour log-probs."""
    teacher: bool = False
    """Wanted: a teacher's log-probs. Turns then have them, be they NaN: a step without any teacher is no error."""
    reduce: Reduce = "logprob_mean"
    required: bool = False
    """A rollout without any scored token is filtered; else it is trained on the log-probs of its sampling."""

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of `Score` that a trained rollout is waited for."""
        wanted = {"repeats": self.repeats, "teacher": self.teacher}
        return frozenset(kind for kind, is_wanted in wanted.items() if is_wanted)


def with_scores(turns: Sequence[TurnTokens], scores: Iterable[Score], rules: ScoreRules) -> tuple[TurnTokens, ...]:
    """The turns with what is known of them. `DataError` for a score whose size is not that of its turns."""
    if not rules.kinds:
        return tuple(turns)
    repeats: dict[str, Floats] = {}
    teacher: dict[str, Floats] = {}
    for score in scores:
        if score.kind == "repeats" and rules.repeats:
            repeats |= _of_version(turns, _by_turn(turns, score, rules.reduce), score.version)
        elif score.kind == "teacher" and rules.teacher:
            teacher |= _by_turn(turns, score, rules.reduce)
    return tuple(
        replace(
            turn,
            scored_logprobs=repeats.get(turn.turn_id),
            teacher_logprobs=teacher.get(turn.turn_id, _unknown(turn)) if rules.teacher else None,
        )
        for turn in turns
    )


def is_scored(turns: Iterable[TurnTokens], rules: ScoreRules) -> bool:
    """Whether some token has each kind of score that is wanted."""
    turns = list(turns)
    found = {
        "repeats": any(_known(turn.scored_logprobs) for turn in turns),
        "teacher": is_taught(turns),
    }
    return all(found[kind] for kind in rules.kinds)


def is_taught(turns: Iterable[TurnTokens]) -> bool:
    """Whether some token has a teacher's log-prob."""
    return any(_known(turn.teacher_logprobs) for turn in turns)


def repeats_of(score: Score) -> Floats:
    """float32[K, S] of a score that has log-probs. `DataError` if its bytes are no such array."""
    if score.repeats < 1 or len(score.logprobs) % (4 * score.repeats):
        raise DataError(f"score of {score.rollout_id}: {len(score.logprobs)} bytes in {score.repeats} repeats")
    return np.frombuffer(score.logprobs, "<f4").astype(np.float32).reshape(score.repeats, -1)


def _by_turn(turns: Sequence[TurnTokens], score: Score, reduce: Reduce) -> dict[str, Floats]:
    """float32[T] of each turn that the score names."""
    if score.reason:
        return {}
    lengths = {turn.turn_id: len(turn.sampled_ids) for turn in turns}
    unknown = [name for name in score.turn_ids if name not in lengths]
    values = repeats_of(score)
    cuts = np.cumsum([lengths.get(name, 0) for name in score.turn_ids])
    if unknown or not len(cuts) or cuts[-1] != values.shape[1]:
        raise DataError(f"score of {score.rollout_id}: {values.shape[1]} tokens for turns {list(score.turn_ids)}")
    return dict(zip(score.turn_ids, np.split(average(values, reduce), cuts[:-1]), strict=True))


def _of_version(turns: Sequence[TurnTokens], found: dict[str, Floats], version: str) -> dict[str, Floats]:
    """NaN where another version sampled the token."""
    return {turn.turn_id: _masked(turn, found[turn.turn_id], version) for turn in turns if turn.turn_id in found}


def _masked(turn: TurnTokens, values: Floats, version: str) -> Floats:
    kept = _unknown(turn)
    for span in turn.versions:
        if span.version == version:
            kept[span.start : span.end] = values[span.start : span.end]
    return kept


def _unknown(turn: TurnTokens) -> Floats:
    return np.full(len(turn.sampled_ids), np.nan, np.float32)


def _known(values: Floats | None) -> bool:
    return values is not None and not np.isnan(values).all()
