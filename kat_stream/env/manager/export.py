"""The rollouts of a run through a format into a folder.

Owns which records count: of a rollout that ran twice the first trajectory that was graded or cannot be, as for the
packer, and of its own rewards the first that is a grade.
Invariant: what is not in the file is counted by why; a rollout that cannot be written is named, never an exception.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kat_stream.env.manager.base import COMMON, Format, Row, common
from kat_stream.env.manager.parquet import open_rows
from kat_stream.env.manager.rollout import rollout_of
from kat_stream.env.manager.rules import Rules, apply_rules
from kat_stream.env.manager.transcript import Policy
from kat_stream.env.manager.where import Condition
from kat_stream.errors import DataError, RequestRefused
from kat_stream.observe.sources import Source, read_records
from topics import Reward, Trajectory

Grades = dict[tuple[str, str], float]
"""Scores by rollout_id and life."""


@dataclass(slots=True)
class Report:
    """What became of the run's rollouts; counts of rollouts, but `rows`, and `kept` and `failed`, which are turns."""

    rows: int = 0
    kept: int = 0
    failed: int = 0
    fates: Counter[str] = field(default_factory=Counter)
    unwritable: list[str] = field(default_factory=list)
    """Rollout and why, of those that cannot be written in this format."""


@dataclass(frozen=True, slots=True)
class Export:
    """How to write: conditions on a rollout, rules for its turns, a format for the rows."""

    format: Format
    policy: Policy
    rules: Rules
    where: Sequence[Condition] = ()

    def rows(self, trajectory: Trajectory, score: float | None, report: Report) -> list[Row]:
        """The rows of one rollout; none, and counted, if it is not meant or cannot be written."""
        try:
            whole = rollout_of(trajectory, score)
            if not all(condition.holds(whole) for condition in self.where):
                report.fates["other than asked"] += 1
                return []
            rollout = apply_rules(whole, self.rules, self.policy.decode)
            rows = [common(rollout) | row for row in self.format.rows(rollout, self.policy)]
        except (DataError, RequestRefused) as error:
            report.fates["cannot be written"] += 1
            report.unwritable.append(f"{trajectory.rollout_id}: {error}")
            return []
        report.fates["written" if rows else "nothing to learn"] += 1
        report.kept += len(rollout.kept)
        report.failed += len(rollout.failed)
        return rows


async def export(source: Source, how: Export, directory: Path) -> Report:
    """Write DIRECTORY/train.parquet, if it has a row; StorageError if that cannot be."""
    report = Report()
    grades = await _grades(source)
    with open_rows(directory, {**COMMON, **how.format.columns}) as writer:
        async for made in _trajectories(source, grades):
            for row in how.rows(made, made.own(grades), report):
                writer.add(row)
    report.rows = writer.count
    return report


async def _grades(source: Source) -> Grades:
    grades: Grades = {}
    async for record, _ in read_records(source, ("rewards",)):
        if isinstance(record, Reward) and record.status == "graded":
            grades.setdefault((record.rollout_id, record.life), record.score)
    return grades


async def _trajectories(source: Source, grades: Grades) -> AsyncIterator[Trajectory]:
    """One of each rollout; one that has no grade while another has comes at the end, if that other is gone."""
    graded = {rollout_id for rollout_id, _ in grades}
    seen: set[str] = set()
    passed: dict[str, Trajectory] = {}
    async for record, _ in read_records(source, ("trajectories",)):
        if not isinstance(record, Trajectory) or record.rollout_id in seen:
            continue
        if record.gradable and record.rollout_id in graded and record.own(grades) is None:
            passed.setdefault(record.rollout_id, record)
        else:
            seen.add(record.rollout_id)
            yield record
    for record in passed.values():
        if record.rollout_id not in seen:
            yield record
