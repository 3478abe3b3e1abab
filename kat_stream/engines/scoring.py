"""A trajectory's sampled tokens scored again: which prefills that takes, and K repeats of them over several engines.

Owns the way from turns to `[K, S]` log-probs. Invariants: every wanted turn is scored by exactly one prefill of a
repeat, parents first, so that the engines' prefix cache serves what paths share; all repeats are by the one weight
version that was read before the first of them, or there is no score: a version that comes back never left.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import anyio
import numpy as np
from numpy.typing import NDArray

from kat_stream.engines.client import EngineClient, Prefill
from kat_stream.errors import DeadlineExceeded, EngineError
from kat_stream.trees import TurnTokens

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Path:
    """One prefill: its ids, the first position whose log-prob is wanted, and the turns that it scores."""

    ids: NDArray[np.int32]
    start: int
    turns: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Manner:
    """How prefills are asked for."""

    repeats: int
    bypass_cache: bool = False
    """Compute the whole path anew, so that repeats do not share the keys and values of its beginning."""
    deadline_s: float = 60.0
    """Of one prefill."""


def paths_of(turns: Sequence[TurnTokens]) -> list[Path]:
    """The fewest prefills for these turns, parents first: a turn that begins another one's path is scored with it."""
    # Sorted as bytes, all alike wide, a beginning stands directly before what extends it.
    full = [np.concatenate([turn.prompt_ids, turn.sampled_ids], dtype=np.int32).tobytes() for turn in turns]
    leaf, members = -1, dict[int, list[int]]()
    for i in sorted(range(len(turns)), key=full.__getitem__, reverse=True):
        if leaf < 0 or not full[leaf].startswith(full[i]):
            leaf = i
        members.setdefault(leaf, []).append(i)
    paths = [
        Path(np.frombuffer(full[leaf], np.int32), min(len(turns[i].prompt_ids) for i in scored), tuple(sorted(scored)))
        for leaf, scored in members.items()
    ]
    return sorted(paths, key=lambda path: path.turns)


async def version_of(engines: Sequence[EngineClient]) -> str | None:
    """The weight version that all engines run; None while they are not of one mind."""
    versions = {(await engine.info()).weight_version for engine in engines}
    return versions.pop() if len(versions) == 1 else None


async def repeat_prefills(
    engines: Sequence[EngineClient], turns: Sequence[TurnTokens], version: str, manner: Manner
) -> Floats | None:
    """float32[K, S]: the turns' sampled tokens, one turn after the other, in K repeats that start on different engines.

    `version` was read before this call; None if other weights answered meanwhile. Raises as `EngineClient.prefill`.
    """
    paths = await anyio.to_thread.run_sync(paths_of, turns)
    answers: list[list[Prefill]] = [[] for _ in range(manner.repeats)]
    failures: list[EngineError | DeadlineExceeded] = []

    async def one(k: int) -> None:
        try:
            for path in paths:
                answers[k].append(await _prefill(engines[k % len(engines)], path, manner))
        except (EngineError, DeadlineExceeded) as error:
            failures.append(error)
            group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        for k in range(manner.repeats):
            group.start_soon(one, k)
    if failures:
        raise failures[0]
    if {prefill.version for row in answers for prefill in row} != {version}:
        return None
    return np.stack([_row(turns, paths, row) for row in answers])


async def _prefill(engine: EngineClient, path: Path, manner: Manner) -> Prefill:
    rid = uuid.uuid4().hex
    return await engine.prefill(
        path.ids.tolist(), path.start, rid=rid, bypass_cache=manner.bypass_cache, deadline_s=manner.deadline_s
    )


def _row(turns: Sequence[TurnTokens], paths: Sequence[Path], answers: Sequence[Prefill]) -> Floats:
    """float32[S]: one repeat, in the order of the turns."""
    found: dict[int, list[float]] = {}
    for path, answer in zip(paths, answers, strict=True):
        for i in path.turns:
            begin = len(turns[i].prompt_ids) - path.start
            found[i] = answer.logprobs[begin : begin + len(turns[i].sampled_ids)]
    return np.array([value for i in range(len(turns)) for value in found[i]], np.float32)
