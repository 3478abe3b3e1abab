"""How old a sampled token is, across restarts of the trainer.

A version is `lineage.number` (topics.policy_version). A lineage that was left behind at number n lives on up to n in
its successor; what it published after n is on no surviving branch.
Invariant: age 0 is the head itself, and a token from an abandoned branch is stale under every bound.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from topics.policy_version import PolicyVersion, parse_version
from topics.turn import VersionSpan

Forks = Mapping[str, tuple[str, int]]
"""lineage -> (parent lineage, number at which it left the parent); a first lineage is absent."""


def forks_of(versions: Iterable[PolicyVersion]) -> dict[str, tuple[str, int]]:
    """The family tree of lineages, from the records of `policy.versions`."""
    return {v.lineage: (v.parent_lineage, v.parent_number) for v in versions if v.parent_lineage}


def age(version: str, head: str, forks: Forks) -> int | None:
    """Optimizer steps between `version` and `head`, or None if `version` is not on head's branch.

    A version newer than the head on the same lineage has a negative age (the reader's head lags).
    """
    lineage, number = parse_version(version)
    here, newest = parse_version(head)
    limit = None
    seen = {here}
    while here != lineage:
        if here not in forks or forks[here][0] in seen:
            return None
        here, left = forks[here]
        limit = left if limit is None else min(left, limit)
        seen.add(here)
    return None if limit is not None and number > limit else newest - number


def is_stale(version: str, head: str, forks: Forks, bound: int) -> bool:
    """True if the version is more than `bound` optimizer steps behind the head, or on an abandoned branch."""
    steps = age(version, head, forks)
    return steps is None or steps > bound


def oldest(spans: Iterable[VersionSpan], head: str, forks: Forks) -> str:
    """The version of the oldest token; one from an abandoned branch counts as older than any other.

    `ValueError` if there are no spans.
    """

    def rank(version: str) -> float:
        steps = age(version, head, forks)
        return float("inf") if steps is None else steps

    return max((span.version for span in spans if span.end > span.start), key=rank)
