"""Packing running requests into the arrays of one step.

Pure but for the random numbers it draws. Invariant: decoding requests come first, in the order of their dense rows,
then one chunk of each request in prefill; a row is sampled only for requests whose last token is in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kat_stream.engines.embedded.graph import Ints, StepInput
from kat_stream.engines.embedded.request import Request


@dataclass(frozen=True, slots=True)
class Chunk:
    """`count` tokens of a request in prefill, from its first uncomputed one on."""

    request: Request
    count: int

    @property
    def complete(self) -> bool:
        """Whether it reaches the request's last token."""
        return self.request.computed + self.count == self.request.length

    def prompt_rows(self) -> range:
        """Positions in the chunk's request whose logits give a wanted prompt log-probability."""
        request = self.request
        first = max(request.computed, request.start + len(request.prompt_logprobs))
        return range(first, min(request.computed + self.count, len(request.prompt) - 1))


def _array(values: list[int]) -> Ints:
    return np.array(values, np.int64)


def _filters(requests: list[Request], vocab: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """float64 [K,3] = top_k, top_p, min_p, or [0,3] when nobody filters."""
    params = [request.params for request in requests]
    if all(p.top_k == -1 and p.top_p == 1.0 and p.min_p == 0.0 for p in params):
        return np.empty((0, 3))
    return np.array([[vocab if p.top_k == -1 else p.top_k, p.top_p, p.min_p] for p in params], np.float64)


def _uniforms(requests: list[Request], random: np.random.Generator) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    drawn = random.random(len(requests))
    for index, request in enumerate(requests):
        if (seed := request.params.sampling_seed) is not None:
            drawn[index] = request.uniform(seed)
    return drawn


def pack(
    decoding: list[Request], chunks: list[Chunk], vocab: int, random: np.random.Generator
) -> tuple[StepInput, list[Request]]:
    """The step's arrays and the requests that it samples for, in the order of the sampled rows."""
    ids = [request.token_at(request.computed) for request in decoding]
    positions = [request.computed for request in decoding]
    slots = [request.slots[request.computed] for request in decoding]
    meta: list[list[int]] = []
    context: list[int] = []
    rows, sampled = list(range(len(decoding))), list(decoding)
    prompt_rows: list[int] = []
    targets: list[int] = []
    for chunk in chunks:
        request, start, at = chunk.request, chunk.request.computed, len(ids)
        end = start + chunk.count
        meta.append([at, chunk.count, start])
        ids.extend(request.tokens()[start:end].tolist())
        positions.extend(range(start, end))
        slots.extend(request.slots[start:end])
        context.extend(request.slots[:start])
        prompt_rows.extend(at + position - start for position in chunk.prompt_rows())
        targets.extend(int(request.prompt[position + 1]) for position in chunk.prompt_rows())
        if chunk.complete:
            rows.append(len(ids) - 1)
            sampled.append(request)
    step = StepInput(
        ids=_array(ids), positions=_array(positions), slots=_array(slots),
        lens=_array([request.computed + 1 for request in decoding]), chunks=_array(meta).reshape(-1, 3),  # type: ignore[arg-type]
        context=_array(context), rows=_array(rows),
        temperature=np.array([request.params.temperature for request in sampled], np.float32),
        uniform=_uniforms(sampled, random), filters=_filters(sampled, vocab),
        prompt_rows=_array(prompt_rows), prompt_targets=_array(targets),
    )  # fmt: skip
    return step, sampled
