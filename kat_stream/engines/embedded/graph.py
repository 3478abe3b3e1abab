"""One engine step as one call: a Hugging Face causal model, our attention below it and the sampler above it.

Owns the traced graph. Invariant: the graph is used only if it agrees with the model's own forward, checked at load on
batches of several shapes; otherwise the same function runs eagerly, and if that disagrees too the model is refused.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields, replace
from logging import ERROR
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from kat_stream.attention import register, row_wide_rope
from kat_stream.engines.embedded.attention import IMPLEMENTATION, layer_attention, sample
from kat_stream.errors import ConfigError

Ints = NDArray[np.int64]
# Float32 noise of a different summation order stays two orders of magnitude below this.
TOLERANCE = 2e-4


@dataclass(frozen=True, slots=True)
class StepInput:
    """One packed batch; the first B of T tokens belong to decoding requests in the order of their dense rows.

    ids, positions, slots int64 [T]; lens int64 [B] (tokens incl. the new one); chunks int64 [P,3] = first row, rows,
    context length; context int64 [sum of context lengths] pool slots; rows int64 [K] to sample; temperature float32
    [K]; uniform float64 [K]; filters float64 [K,3] or [0,3]; prompt_rows, prompt_targets int64 [M]: prompt
    log-probabilities wanted.
    """

    ids: Ints
    positions: Ints
    slots: Ints
    lens: Ints
    chunks: Ints
    context: Ints
    rows: Ints
    temperature: NDArray[np.float32]
    uniform: NDArray[np.float64]
    filters: NDArray[np.float64]
    prompt_rows: Ints
    prompt_targets: Ints

    def tensors(self) -> tuple[Tensor, ...]:
        """The arrays as tensors that share their memory, in the order of `StepModule.forward`."""
        return tuple(torch.from_numpy(getattr(self, field.name)) for field in fields(self))


@dataclass(slots=True)
class PagedStep:
    """What one forward hands to every layer's attention, as a keyword that the model passes through."""

    pool: Tensor
    dense: Tensor
    slots: Tensor
    lens: Tensor
    chunks: Tensor
    context: Tensor


def paged_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *, scaling: float | None, paged: PagedStep,
) -> tuple[Tensor, None]:  # fmt: skip
    """What `transformers` calls: query [1,H,T,D], key and value [1,G,T,D] -> ([1,T,H,D], None)."""
    scale = query.size(-1) ** -0.5 if scaling is None else float(scaling)
    out = layer_attention(
        query, key, value, paged.pool, paged.dense, paged.slots, paged.lens, paged.chunks, paged.context,
        int(module.layer_idx), scale,  # type: ignore[arg-type]
    )  # fmt: skip
    return out, None


register(IMPLEMENTATION, paged_attention, "paged")


class StepModule(nn.Module):
    """Forward and sampling of one packed batch."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, ids: Tensor, positions: Tensor, slots: Tensor, lens: Tensor, chunks: Tensor, context: Tensor,
        rows: Tensor, temperature: Tensor, uniform: Tensor, filters: Tensor,
        prompt_rows: Tensor, prompt_targets: Tensor, pool: Tensor, dense: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Shapes as in `StepInput`; returns tokens int64 [K], their log-probs float32 [K], prompt log-probs float32
        [M]."""
        output = self.model(
            input_ids=ids[None], position_ids=positions[None], use_cache=False,
            logits_to_keep=torch.cat([rows, prompt_rows]),
            paged=PagedStep(pool, dense, slots, lens, chunks, context),
        )  # fmt: skip
        logits = output.logits[0]
        tokens, logprobs = sample(logits[: rows.size(0)], temperature, uniform, filters)
        prompt = torch.log_softmax(logits[rows.size(0) :].float(), dim=-1)
        return tokens, logprobs, prompt.gather(1, prompt_targets[:, None])[:, 0]


def trial(vocab: int, lengths: list[int], decoding: int, seed: int) -> StepInput:
    """A random batch for the check: `decoding` rows at position 0, then one prompt a length, all prompt log-probs
    wanted."""
    random = np.random.default_rng(seed)
    total = decoding + sum(lengths)
    starts = decoding + np.cumsum([0, *lengths[:-1]])
    chunks = np.array([[s, n, 0] for s, n in zip(starts, lengths, strict=True)], np.int64).reshape(-1, 3)
    positions = np.concatenate([np.zeros(decoding, np.int64), *(np.arange(n) for n in lengths)])
    rows = np.arange(total, dtype=np.int64)
    return StepInput(
        ids=random.integers(0, vocab, total), positions=positions, slots=rows, lens=np.ones(decoding, np.int64),
        chunks=chunks, context=np.empty(0, np.int64), rows=rows[:decoding], temperature=np.ones(decoding, np.float32),
        uniform=random.random(decoding), filters=np.empty((0, 3)), prompt_rows=rows[decoding:],
        prompt_targets=random.integers(0, vocab, total - decoding),
    )  # fmt: skip


def piece(whole: StepInput, start: int, stop: int) -> StepInput:
    """Tokens [start, stop) of a `trial` of one prompt, behind those before them: a chunk, or one token that decodes."""
    part, behind, none = slice(start, stop), np.arange(start), np.empty(0, np.int64)
    decodes = stop - start == 1
    return replace(
        whole, ids=whole.ids[part], positions=whole.positions[part], slots=whole.slots[part],
        lens=np.array([stop]) if decodes else none,
        chunks=np.array([[0, stop - start, start]])[decodes:], context=none if decodes else behind,
        prompt_rows=np.arange(stop - start), prompt_targets=whole.prompt_targets[part],
    )  # fmt: skip


def expected(model: PreTrainedModel, batch: StepInput) -> NDArray[np.float32]:
    """Prompt log-probs of a `trial` batch by the model's own attention: float32 [M]."""
    parts = []
    model.set_attn_implementation("eager")
    for start, count, _ in batch.chunks.tolist():
        ids = torch.from_numpy(batch.ids[start : start + count])[None]
        parts.append(torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0].float(), dim=-1))
    model.set_attn_implementation(IMPLEMENTATION)
    chosen = torch.cat(parts).gather(1, torch.from_numpy(batch.prompt_targets)[:, None])
    return np.asarray(chosen[:, 0].numpy(), np.float32)


def _agrees(step: Any, model: PreTrainedModel, pool: Tensor, dense: Tensor, vocab: int) -> bool:
    """Whether `step` gives the model's own log-probs on shapes other than those it was traced with."""
    for seed, (lengths, decoding) in enumerate([([3], 0), ([17, 2, 29], 2), ([1, 40], 5), ([64], 1)]):
        batch = trial(vocab, lengths, decoding, seed)
        got = step(*batch.tensors(), pool, dense)[2].numpy()
        if not np.allclose(got, expected(model, batch), rtol=0, atol=TOLERANCE):
            return False
    # Keys and values of earlier steps: a prompt in two chunks, and a token that decodes from its dense row.
    whole, found = trial(vocab, [12], 0, 98), []
    for start, stop in ((0, 5), (5, 11), (11, 12)):
        dense[:, :, 0, :, :start] = pool[:, :, :start].transpose(2, 3)
        found.append(step(*piece(whole, start, stop).tensors(), pool, dense)[2].numpy())
    return np.allclose(np.concatenate(found), expected(model, whole), rtol=0, atol=TOLERANCE)


def build_step(model: PreTrainedModel, pool: Tensor, dense: Tensor, vocab: int) -> Any:
    """The fastest callable that agrees with `model`'s forward; overwrites `pool` and `dense`.

    Raises ConfigError for an architecture whose attention is more than causal softmax attention (sliding windows,
    soft caps) over heads of one size, or whose positions are not a request's own.
    """
    name = type(model).__name__
    if (kind := row_wide_rope(model.config.get_text_config())) is not None:
        raise ConfigError(f"{name}: RoPE of type {kind} depends on the longest request of a batch")
    eager = StepModule(model)
    try:
        agrees = _agrees(eager, model, pool, dense, vocab)
    except RuntimeError as error:  # keys and values of other shapes than the configuration's heads
        said = str(error).strip().splitlines()[-1]
        raise ConfigError(f"{name}: attention the embedded engine does not compute: {said}") from error
    if not agrees:
        raise ConfigError(f"{name}: attention the embedded engine does not compute (checked at load)")
    example: tuple[Tensor, ...] = (*trial(vocab, [5, 3], 2, 99).tensors(), pool, dense)
    verbosity = logging.get_verbosity()
    logging.set_verbosity(ERROR)
    with warnings.catch_warnings():
        # Tracing reads deprecated attributes and warns of every Python branch; what could break, `_agrees` checks.
        warnings.simplefilter("ignore")
        try:
            traced = torch.jit.trace(eager, example, check_trace=False)
            return traced if _agrees(traced, model, pool, dense, vocab) else eager
        except RuntimeError:
            # Control flow that cannot be traced or replayed (mixtures of experts): the eager step is exact, only
            # slower.
            return eager
        finally:
            logging.set_verbosity(verbosity)
