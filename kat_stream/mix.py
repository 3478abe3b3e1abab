"""Which scaffolds the members of a group run under, by the weights of a mix. Pure.

Invariant: who runs under what is a function of the seed's coin alone. On average the shares are exactly the weights,
and a scaffold has no member or at least two of a group, as far as the group's size permits: the baseline of a reward
is over (task, scaffold), so a member alone would teach nothing.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from itertools import accumulate

from kat_stream.errors import ConfigError

_PAIR = 2


def check_mix(mix: Mapping[str, float]) -> dict[str, float]:
    """The mix as it is; ConfigError for a weight that is none."""
    for name, weight in mix.items():
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigError(f"sampler.scaffold: {name} = {weight!r}: a weight is a number above 0")
    return dict(mix)


def members(mix: Mapping[str, float], size: int, coin: random.Random) -> list[str]:
    """Names of `size` members, equal ones beside each other; `mix` has at least one name.

    Systematic sampling: pairs at equal distances on the line of weights, from a random start.
    """
    names, ends = list(mix), list(accumulate(mix.values()))
    pairs = max(size // _PAIR, 1)
    start = coin.random()
    chosen = [_at((start + pair) / pairs * ends[-1], names, ends) for pair in range(pairs)]
    return [chosen[min(member // _PAIR, pairs - 1)] for member in range(size)]


def _at(point: float, names: list[str], ends: list[float]) -> str:
    return next((name for name, end in zip(names, ends, strict=True) if point < end), names[-1])
