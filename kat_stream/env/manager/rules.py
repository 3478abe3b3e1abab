"""Which turns of a rollout are learned from, and in what order: the same rules in front of every format.

Invariant: rules leave turns out whole or not at all; the context of what remains is unchanged. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from kat_stream.env.manager.rollout import Rollout, Step

Order = Literal["completed", "thread", "branch"]
Decode = Callable[[list[int]], str]

FAILED = (
    r"\[exit (?!0\])-?\d+\]|<returncode>(?!0<)-?\d+</returncode>|\"returncode\": (?!0\b)-?\d+"
    r"|(?i:exit code:? (?!0\b)-?\d+)|(?m:^\s*(?:[Ee]rror|\w+Error):)"
)
"""How agents tell the policy that a call went wrong: the shell agent, mini-swe-agent (both forms), Qwen Code,
OpenHands; and errors of Python. What is only a flag in an agent's request (Anthropic's is_error) is in no prompt."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What is left out, and how the rest is ordered."""

    order: Order = "completed"
    """completed: as calls ended; thread: the agent's threads one by one; branch: branches of the tree one by one."""
    max_tokens: int | None = None
    """Longest path of a turn, its prompt included."""
    max_turns: int | None = None
    """Most turns on a path: later ones are left out."""
    failed: re.Pattern[str] | None = None
    """Leave out a turn whose tool call does not parse, or whose result (what came behind it) has this in it."""


def apply_rules(rollout: Rollout, rules: Rules, decode: Decode) -> Rollout:
    """The rollout with `kept` and `failed` set; `decode` is asked only where results are looked at."""
    failed = frozenset(_failed(rollout, rules.failed, decode)) if rules.failed else frozenset[int]()
    kept = [step for step in rollout.learned() if step.number not in failed and _fits(step, rules)]
    return replace(rollout, kept=tuple(step.number for step in _ordered(rollout, kept, rules.order)), failed=failed)


def _fits(step: Step, rules: Rules) -> bool:
    short = rules.max_tokens is None or len(step.ids) <= rules.max_tokens
    return short and (rules.max_turns is None or step.depth <= rules.max_turns)


def _failed(rollout: Rollout, pattern: re.Pattern[str], decode: Decode) -> Iterable[int]:
    for step in rollout.steps:
        if step.record.ill_formed:
            yield step.number
        before = _answered(rollout, step)
        if before is not None and pattern.search(decode(step.ids[len(before.ids) : step.spans[-1].start].tolist())):
            yield before.number


def _answered(rollout: Rollout, step: Step) -> Step | None:
    """The turn whose result begins what is new in the prompt of this one: the whole of it is on the path."""
    if step.depth < 2:
        return None
    span = step.spans[-2]
    before = rollout.steps[span.turn]
    return before if span == before.spans[-1] else None


def _ordered(rollout: Rollout, kept: list[Step], order: Order) -> list[Step]:
    if order == "completed":
        return kept
    if order == "branch":
        return sorted(kept, key=lambda step: [span.turn for span in step.spans])
    first: dict[str, int] = {}
    for step in rollout.steps:
        first.setdefault(step.record.thread, step.number)
    return sorted(kept, key=lambda step: first[step.record.thread])
