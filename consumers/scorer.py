"""Scorer: finished trajectories scored again, K times by the engines that sampled them (MCLA), and by a teacher.

In:      trajectories
Out:     scores
Key:     group_id
Commits: a trajectory when its scores are acknowledged
Fails:   an engine that is away or runs other weights gives a score with the reason and no log-probs
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import aiohttp
import anyio
import numpy as np
from prometheus_client import Counter, Gauge

from kat_stream.config import ScorerSection
from kat_stream.engines.client import EngineClient
from kat_stream.engines.scoring import Floats, Manner, repeat_prefills, version_of
from kat_stream.errors import DataError, DeadlineExceeded, EngineError
from kat_stream.log.base import Delivered
from kat_stream.log.outcome import Emit, Outcome
from kat_stream.log.work import run_work
from kat_stream.policy import vocabulary
from kat_stream.rl.mcla import identical, reduce_gap, scaling, variances
from kat_stream.rl.teachers import Family, Teachers
from kat_stream.service import Context
from kat_stream.trees import TurnTokens, turns_of
from topics import Record, Score, Trajectory

log = logging.getLogger(__name__)

DRAIN_S = 3.0
SCORES = Counter("kat_scores_total", "Scores written", ["kind", "result"])
IDENTICAL = Counter("kat_scores_identical_total", "Scores whose repeats were equal to the bit: averaging is no benefit")
VARIANCE = Gauge("kat_score_variance", "Variance of a token's log-prob over repeats, newest score", ["quantile"])
SCALING = Gauge("kat_score_scaling", "K * var_K / var_1 of the newest score: 1 if averaging helps in full", ["k"])
GAP = Gauge("kat_score_reduce_gap", "logmeanexp - logprob_mean of the newest score, nats a token")


class Scorer:
    async def run(self, ctx: Context) -> None:
        section = ctx.config.scorer
        teachers = await anyio.to_thread.run_sync(teachers_of, section, ctx.config.policy.model)
        async with aiohttp.ClientSession() as session:
            engines = [EngineClient(url, session) for url in ctx.engine_urls]
            asked = {teacher.name: EngineClient(teacher.url, session) for teacher in section.teachers}
            await run_work(
                ctx.log,
                ("trajectories",),
                group=ctx.group("scorer"),
                member=ctx.member,
                handler=ScorerHandler(ctx.run, section, engines, teachers, asked),
                stopping=ctx.stopping,
                max_in_flight=section.in_flight,
                drain_s=DRAIN_S,
                dead_letters=ctx.dead_letters,
            )


def teachers_of(section: ScorerSection, policy: str) -> Teachers | None:
    """The table of teachers; None without any. `ConfigError` for one that reads other token ids than the policy."""
    if not section.teachers:
        return None
    scores: dict[Family, dict[str, float]] = {}
    for teacher in section.teachers:
        for family, score in teacher.scores.items():
            domain, _, scaffold = family.partition("/")
            scores.setdefault((domain, scaffold), {})[teacher.name] = score
    vocabularies = {teacher.name: vocabulary(teacher.model) for teacher in section.teachers}
    table = Teachers(scores, vocabularies, default=section.teachers[0].name)
    table.check(vocabulary(policy))
    return table


@dataclass(slots=True)
class Found:
    """Log-probs of some turns, or why there are none."""

    version: str = ""
    turns: Sequence[TurnTokens] = ()
    logprobs: Floats | None = None
    reason: str = ""


class ScorerHandler:
    """One trajectory to one score of each kind that is asked for; what is not trained gets none."""

    def __init__(
        self,
        run: str,
        section: ScorerSection,
        engines: Sequence[EngineClient],
        teachers: Teachers | None,
        asked: Mapping[str, EngineClient],
    ) -> None:
        self.run_name, self.section, self.engines = run, section, engines
        self.teachers, self.asked = teachers, asked

    async def __call__(self, delivered: Delivered) -> Outcome:
        trajectory = delivered.record()
        if not isinstance(trajectory, Trajectory) or trajectory.run != self.run_name:
            return Emit()
        if not trajectory.gradable or trajectory.request.purpose == "eval":
            return Emit()
        turns = _trainable(trajectory)
        scores: list[Record] = []
        if self.section.repeats:
            found = await self._asked(self.engines, turns, self.section.repeats, sampled_by_them=True)
            scores.append(score_of(trajectory, "repeats", "engines", found))
        if self.teachers is not None:
            scores.append(await self._taught(trajectory, turns, self.teachers))
        return Emit(*scores)

    async def _taught(self, trajectory: Trajectory, turns: Sequence[TurnTokens], teachers: Teachers) -> Score:
        task = trajectory.request.task
        name = teachers.choose((task.dataset, task.scaffold))
        if name is None:
            return score_of(trajectory, "teacher", "", Found(reason="unmapped"))
        found = await self._asked([self.asked[name]], turns, 1, sampled_by_them=False)
        return score_of(trajectory, "teacher", name, found)

    async def _asked(
        self, engines: Sequence[EngineClient], turns: Sequence[TurnTokens], repeats: int, *, sampled_by_them: bool
    ) -> Found:
        """Prefills of all turns; of engines that sampled them, only of turns with a token of their present version."""
        manner = Manner(repeats, self.section.bypass_cache, self.section.call_timeout_s)
        try:
            version = await version_of(engines)
            mine = [turn for turn in turns if not sampled_by_them or _is_of(turn, version)]
            if version is None or not mine:
                return Found(reason="other_version" if turns else "no_turns")
            logprobs = await repeat_prefills(engines, mine, version, manner)
        except (EngineError, DeadlineExceeded) as error:
            log.warning("not scored: %s", error)
            return Found(reason=f"engine: {error}")
        return Found(version, mine, logprobs, "other_version" if logprobs is None else "")


def _trainable(trajectory: Trajectory) -> list[TurnTokens]:
    try:
        return [turn for turn in turns_of(trajectory.turns) if turn.trainable]
    except DataError:  # the packer filters it with the reason
        return []


def _is_of(turn: TurnTokens, version: str | None) -> bool:
    return any(span.version == version and span.end > span.start for span in turn.versions)


def score_of(trajectory: Trajectory, kind: Literal["repeats", "teacher"], scorer: str, found: Found) -> Score:
    """The record of what was found, and the metrics of it. Identical repeats are kept once: that is their average."""
    values = found.logprobs
    same = values is not None and len(values) > 1 and identical(values)
    if values is not None and len(values) > 1:
        _observe(values, same)
    SCORES.labels(kind, found.reason.partition(":")[0] or "scored").inc()
    kept = None if values is None else values[:1] if same else values
    return Score(
        run=trajectory.run,
        group_id=trajectory.group_id,
        rollout_id=trajectory.rollout_id,
        scorer=scorer,
        version=found.version,
        turn_ids=() if kept is None else tuple(turn.turn_id for turn in found.turns),
        repeats=0 if kept is None else len(kept),
        logprobs=b"" if kept is None else kept.astype("<f4").tobytes(),
        kind=kind,
        reason=found.reason,
        identical=same,
        life=trajectory.life,
    )


def _observe(values: Floats, same: bool) -> None:
    """What repeating was good for, from at least two repeats; nothing is claimed for identical ones."""
    if same:
        IDENTICAL.inc()
        _say_identical()
        return
    spread = variances(values)
    for quantile in (0.5, 0.9, 0.99, 1.0):
        VARIANCE.labels(f"{quantile:g}").set(float(np.quantile(spread, quantile)))
    for k in {2, len(values) // 2} - {0, 1}:
        if len(values) >= 2 * k and (ratio := scaling(values, k)) is not None:
            SCALING.labels(str(k)).set(ratio)
    GAP.set(reduce_gap(values))


@cache
def _say_identical() -> None:
    """Once a process: the counter tells how often."""
    log.warning(
        "repeats of a trajectory are equal to the bit: averaging them is no benefit (kat_scores_identical_total)"
    )
