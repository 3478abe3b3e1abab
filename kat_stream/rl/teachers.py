"""Which teacher a task learns from: the one with the best measured score on its family. Pure.

Invariant: one teacher a sample, never an average; a family that was not measured has none, and a teacher that reads
other token ids than the policy is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kat_stream.errors import ConfigError

Family = tuple[str, str]
"""(domain, scaffold)."""


@dataclass(frozen=True, slots=True)
class Teachers:
    """`scores`: family -> teacher -> measured score; `vocabularies`: teacher -> fingerprint of its token ids."""

    scores: Mapping[Family, Mapping[str, float]]
    vocabularies: Mapping[str, str]
    default: str
    """Wins ties."""

    def check(self, policy_vocabulary: str) -> None:
        """`ConfigError` naming the teacher whose vocabulary is not the policy's, or is not known."""
        for name in sorted({self.default, *(name for row in self.scores.values() for name in row)}):
            found = self.vocabularies.get(name)
            if found != policy_vocabulary:
                raise ConfigError(
                    f"teacher {name!r} has the vocabulary {found}, the policy has {policy_vocabulary}: log-probs of "
                    "its tokens would be of other text"
                )

    def choose(self, family: Family) -> str | None:
        """The teacher of this family; None: nothing was measured, so its samples are not distilled."""
        row = self.scores.get(family)
        if not row:
            return None
        best = max(row.values())
        tied = sorted(name for name, score in row.items() if score == best)
        return self.default if self.default in tied else tied[0]
