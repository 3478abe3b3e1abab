"""Attention over a paged KV pool, and sampling, as scripted functions: one call a step, without the interpreter lock.

Owns the two kernels that the model's forward calls. Invariant: after a layer's call the keys and values of every packed
token are in the pool at the token's slot and, for decoding requests, in their dense row; queries see exactly the
tokens of their own request up to themselves. Loops run in TorchScript, so that a busy event loop in the same process
cannot stall a step at each small operation. (Annotations must be real objects here: TorchScript reads them.)
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

IMPLEMENTATION = "kat_paged"


def scripted(function: Callable[..., Any]) -> Callable[..., Any]:
    """TorchScript, without its deprecation note: it needs neither a compiler nor warm-up, unlike its successors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        compiled: Callable[..., Any] = torch.jit.script(function)
    return compiled


def _decode_attention(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lens: Tensor, scale: float
) -> Tensor:
    """One query a row. q [B,H,D]; k, v [B,G,D]; keys, values [R,G,cap,D] dense rows; lens [B] counts the new token."""
    batch, groups, dim = k.size(0), k.size(1), k.size(2)
    rows = torch.arange(batch)
    keys, values = keys[:batch], values[:batch]
    keys.transpose(1, 2).index_put_((rows, lens - 1), k)
    values.transpose(1, 2).index_put_((rows, lens - 1), v)
    longest = int(lens.max().item())
    # Query heads of one key head become query positions: no copy of the keys, whatever the group size.
    queries = q.reshape(batch, groups, q.size(1) // groups, dim)
    hidden = torch.arange(longest)[None, :] >= lens[:, None]
    bias = torch.zeros(batch, longest, dtype=q.dtype).masked_fill_(hidden, float("-inf"))[:, None, None, :]
    out = functional.scaled_dot_product_attention(
        queries, keys[:, :, :longest], values[:, :, :longest],
        attn_mask=bias.expand(batch, 1, queries.size(2), longest), scale=scale,
    )  # fmt: skip
    return out.reshape(batch, q.size(1), dim)


_decode = scripted(_decode_attention)


def _prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, chunks: Tensor, context: Tensor, scale: float
) -> list[Tensor]:
    """q [H,T,D], k, v [G,T,D]; keys, values [S,G,D] pool; chunks [P,3] = first row, rows, context; context [sum]
    slots."""
    gqa = q.size(0) != k.size(0)
    parts: list[Tensor] = []
    offset = 0
    for index in range(chunks.size(0)):
        start, count, past = int(chunks[index, 0].item()), int(chunks[index, 1].item()), int(chunks[index, 2].item())
        own_q = q[None, :, start : start + count]
        own_k, own_v = k[None, :, start : start + count], v[None, :, start : start + count]
        if past == 0:
            out = functional.scaled_dot_product_attention(
                own_q, own_k, own_v, is_causal=True, scale=scale, enable_gqa=gqa
            )
        else:
            slots = context[offset : offset + past]
            all_k = torch.cat([keys.index_select(0, slots).transpose(0, 1)[None], own_k], dim=2)
            all_v = torch.cat([values.index_select(0, slots).transpose(0, 1)[None], own_v], dim=2)
            mask = torch.ones(count, past + count, dtype=torch.bool).tril(past)
            out = functional.scaled_dot_product_attention(
                own_q, all_k, all_v, attn_mask=mask, scale=scale, enable_gqa=gqa
            )
        parts.append(out[0].transpose(0, 1))
        offset += past
    return parts


_prefill = scripted(_prefill_attention)


def _layer_attention(
    q: Tensor, k: Tensor, v: Tensor, pool: Tensor, dense: Tensor, slots: Tensor,
    lens: Tensor, chunks: Tensor, context: Tensor, layer: int, scale: float,
) -> Tensor:  # fmt: skip
    """One layer. q [1,H,T,D]; k, v [1,G,T,D]; pool [layers,2,S,G,D]; dense [layers,2,R,G,cap,D]; out [1,T,H,D]."""
    keys, values = pool[layer, 0], pool[layer, 1]
    token_k, token_v = k[0].transpose(0, 1), v[0].transpose(0, 1)
    keys.index_copy_(0, slots, token_k)
    values.index_copy_(0, slots, token_v)
    decoding = lens.size(0)
    parts: list[Tensor] = []
    if decoding > 0:
        first_q = q[0, :, :decoding].transpose(0, 1)
        parts.append(
            _decode(first_q, token_k[:decoding], token_v[:decoding], dense[layer, 0], dense[layer, 1], lens, scale)
        )
    if chunks.size(0) > 0:
        parts.extend(_prefill(q[0], k[0], v[0], keys, values, chunks, context, scale))
    return torch.cat(parts, dim=0)[None]


layer_attention = scripted(_layer_attention)


def _sample(logits: Tensor, temperature: Tensor, uniform: Tensor, filters: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token a row by the inverse CDF.

    logits float [K,V]; temperature float32 [K], 0 = greedy; uniform float64 [K] in [0,1); filters float64 [K,3] =
    top_k, top_p, min_p, or [0,3] where no row filters. Returns tokens int64 [K] and their float32 log-probabilities
    [K] under log_softmax(logits / temperature) before filtering, as SGLang reports them (greedy rows: temperature 1).
    """
    greedy = temperature <= 0.0
    scaled = logits.float() / temperature.masked_fill(greedy, 1.0)[:, None]
    logprobs = torch.log_softmax(scaled, dim=-1)
    probs = logprobs.exp().double()
    if filters.size(0) > 0:
        ordered, order = probs.sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered
        drop = torch.arange(ordered.size(1))[None, :] >= filters[:, 0:1]
        drop = drop | (before > filters[:, 1:2]) | (ordered < ordered[:, 0:1] * filters[:, 2:3])
        probs = torch.zeros_like(probs).scatter_(1, order, ordered.masked_fill(drop, 0.0))
    cdf = probs.cumsum(dim=-1)
    target = (uniform * cdf[:, -1])[:, None]
    drawn = torch.searchsorted(cdf, target, right=True)[:, 0]
    # Rounding may put the target on the last step of the CDF: the largest probability is then as good a draw as any.
    best = logits.argmax(dim=-1)
    tokens = torch.where(greedy | (drawn >= logits.size(1)), best, drawn)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


sample = scripted(_sample)
