"""`policy.versions`: weights that may be sampled from. Written by the trainer; read by weight sync and all gates.

A lineage is one uninterrupted life of a trainer: a restart from a checkpoint opens a new one, and versions that the
abandoned lineage published after that checkpoint are stale. On engines and in turns a version is `lineage.number`.
"""

from __future__ import annotations

from topics.record import Record


class PolicyVersion(Record, frozen=True, kw_only=True, tag="PolicyVersion/1"):
    model: str
    lineage: str
    number: int
    """Optimizer steps since the start of the run; a new lineage goes on counting from its checkpoint."""
    path: str
    checksum: str
    parent_lineage: str = ""
    parent_number: int = -1
    """Where this lineage left its parent."""
    groups_below: int = 0
    """All training groups of lower numbers entered the steps behind these weights."""
    groups_beyond: tuple[int, ...] = ()
    """And these, of higher numbers: groups end in another order than they began."""

    @property
    def branch(self) -> str:
        """The message key: compaction keeps the newest version of every lineage of every run, so no fork is lost."""
        return f"{self.run}/{self.lineage}"

    @property
    def version(self) -> str:
        return format_version(self.lineage, self.number)


def format_version(lineage: str, number: int) -> str:
    return f"{lineage}.{number}"


def parse_version(version: str) -> tuple[str, int]:
    """`lineage.number` -> (lineage, number); `ValueError` for anything else."""
    lineage, dot, number = version.rpartition(".")
    if not dot or not lineage or not number.isdigit():
        raise ValueError(f"not a policy version: {version!r}")
    return lineage, int(number)
