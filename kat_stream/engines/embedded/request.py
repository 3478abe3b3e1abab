"""One generation request: its parameters, its progress, and its answer in SGLang's shape.

Owns the validation of what a client sends and the JSON it gets back. Invariant: `output` and `logprobs` only grow, and
`spans` covers them without gaps, so another thread may read a prefix of known length without a lock.
"""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from kat_stream.engines.client import MAX_STOP_BYTES, MAX_STOPS
from kat_stream.errors import EngineRejected

if TYPE_CHECKING:
    from kat_stream.engines.embedded.radix import Node, RadixCache

MASK = (1 << 64) - 1


class SamplingBody(msgspec.Struct, frozen=True, kw_only=True):
    """`sampling_params` of POST /generate with SGLang's defaults; unknown fields are ignored, as SGLang does."""

    max_new_tokens: int | None = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    sampling_seed: int | None = None
    stream_interval: int | None = None
    skip_special_tokens: bool = True
    no_stop_trim: bool = False
    n: int = 1

    def check(self) -> None:
        """Raise EngineRejected naming the first field that is out of range."""
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise EngineRejected(f"temperature must be a finite number >= 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise EngineRejected(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise EngineRejected(f"min_p must be in [0, 1], got {self.min_p}")
        if self.top_k < 1 and self.top_k != -1:
            raise EngineRejected(f"top_k must be -1 (off) or at least 1, got {self.top_k}")
        if self.max_new_tokens is not None and self.max_new_tokens < 0:
            raise EngineRejected(f"max_new_tokens must be at least 0, got {self.max_new_tokens}")
        if self.stream_interval is not None and self.stream_interval < 1:
            raise EngineRejected(f"stream_interval must be at least 1, got {self.stream_interval}")
        if self.n != 1:
            raise EngineRejected(f"n must be 1, got {self.n}: send one request a sample")
        self._check_stops()

    def _check_stops(self) -> None:
        stops = self.stops()
        if len(stops) > MAX_STOPS:
            raise EngineRejected(f"stop: at most {MAX_STOPS} stop strings, got {len(stops)}")
        try:
            longest = max((len(stop.encode()) for stop in stops), default=0)
        except UnicodeEncodeError as error:
            raise EngineRejected(f"stop: half a surrogate pair is no text: {error}") from error
        if longest > MAX_STOP_BYTES:
            raise EngineRejected(f"stop: a stop string has at most {MAX_STOP_BYTES} bytes, got {longest}")

    def streams(self, count: int) -> bool:
        """Whether a piece of a stream comes with the output token of this number, from 1 on."""
        return (count - 1) % (self.stream_interval or 1) == 0

    def stops(self) -> tuple[str, ...]:
        """Stop strings as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class GenerateBody(msgspec.Struct, frozen=True, kw_only=True):
    """Body of POST /generate."""

    input_ids: list[int] | None = None
    text: str | None = None
    sampling_params: SamplingBody = SamplingBody()
    rid: str | None = None
    return_logprob: bool = False
    logprob_start_len: int = -1
    return_routed_experts: bool = False
    routed_experts_start_len: int = 0
    stream: bool = False


@dataclass(slots=True, eq=False)
class Request:
    """State of one request. `prompt` int32 [n]; `limit` output tokens at most (0: the prompt is only scored); `start`
    first prompt position whose
    log-probability is wanted (n if none). `computed` tokens have keys and values, in `slots[:computed]`, of which the
    first `shared` belong to the prefix cache. Times in seconds of `time.perf_counter`."""

    rid: str
    prompt: NDArray[np.int32]
    params: SamplingBody
    limit: int
    start: int
    stop_ids: frozenset[int]
    body: GenerateBody
    arrived: float
    output: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    spans: list[tuple[str, int, int]] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    cache: RadixCache | None = None
    node: Node | None = None
    shared: int = 0
    computed: int = 0
    row: int = -1
    cached: int = -1
    retractions: int = 0
    routes: list[NDArray[np.uint16]] = field(default_factory=list)
    """uint16[n_i, W]: experts of the first `routed` tokens as they were first run; kept when memory is taken back."""
    routed: int = 0
    finish: dict[str, Any] | None = None
    admitted: float = 0.0
    first_token: float = 0.0
    ended: float = 0.0

    @property
    def length(self) -> int:
        """Prompt and output tokens so far."""
        return len(self.prompt) + len(self.output)

    def tokens(self) -> NDArray[np.int32]:
        """Prompt and output: int32 [length]."""
        return np.concatenate([self.prompt, np.array(self.output, np.int32)]) if self.output else self.prompt

    def cacheable(self) -> int:
        """How long a cached prefix may be: the last token must run, and so must those before a wanted log-prob."""
        wanted = self.start + len(self.prompt_logprobs)
        return min(self.length - 1, wanted) if wanted < len(self.prompt) - 1 else self.length - 1

    def token_at(self, position: int) -> int:
        """The token at a position of prompt and output."""
        known = len(self.prompt)
        return int(self.prompt[position]) if position < known else self.output[position - known]

    def accept(self, token: int, logprob: float, version: str) -> None:
        """Append one sampled token and extend the span of its weight version."""
        self.output.append(token)
        self.logprobs.append(logprob)
        count = len(self.output)
        if self.spans and self.spans[-1][0] == version:
            self.spans[-1] = (version, self.spans[-1][1], count)
        else:
            self.spans.append((version, count - 1, count))

    def note_routes(self, rows: NDArray[np.uint16]) -> None:
        """Experts of the tokens after those that are known: what was sampled keeps the routing of its sampling."""
        self.routes.append(rows)
        self.routed += len(rows)

    def uniform(self, seed: int) -> float:
        """A number in [0, 1) that depends on the seed and the position only, not on the batch (splitmix64)."""
        z = (seed * 0x9E3779B97F4A7C15 + (len(self.output) + 1) * 0xD1B54A32D192ED03) & MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return ((z ^ (z >> 31)) >> 11) * 2.0**-53

    def answer(self, count: int, text: str, version: str, finished: bool) -> dict[str, Any]:
        """The response of /generate after `count` output tokens; `finished` tells whether it is the last one."""
        spans = [{"version": v, "start": s, "end": min(e, count)} for v, s, e in list(self.spans) if s < count]
        meta: dict[str, Any] = {
            "id": self.rid,
            "finish_reason": self.finish if finished else None,
            "prompt_tokens": len(self.prompt),
            "completion_tokens": count,
            "cached_tokens": max(self.cached, 0),
            "cached_tokens_details": {"device": max(self.cached, 0), "host": 0},
            "num_retractions": self.retractions,
            "weight_version": spans[-1]["version"] if spans else version,
            "weight_versions": spans,
        }
        if self.body.return_logprob:
            meta |= self._logprob_fields(count)
        if finished:
            meta["e2e_latency"] = self.ended - self.arrived
            meta["queue_time"] = max(self.admitted - self.arrived, 0.0)
            if self.body.return_routed_experts:
                meta["routed_experts"] = self._routed_experts(len(self.prompt) + count - 1)
        return {"text": text, "output_ids": self.output[:count], "meta_info": meta}

    def _routed_experts(self, stop: int) -> str | None:
        """Base64 of int32[stop - start, layers, top_k]; None if a token of them never ran."""
        if self.routed < stop:
            return None
        rows = np.concatenate(self.routes)[self.body.routed_experts_start_len : stop]
        return base64.b64encode(rows.astype("<i4").tobytes()).decode()

    def _logprob_fields(self, count: int) -> dict[str, Any]:
        wanted = self.prompt[self.start :].tolist()
        known: list[float | None] = [None, *self.prompt_logprobs]
        output = zip(self.logprobs[:count], self.output[:count], strict=True)
        return {
            "input_token_logprobs": [[lp, token, None] for lp, token in zip(known, wanted, strict=False)],
            "output_token_logprobs": [[lp, token, None] for lp, token in output],
            "output_token_logprobs_length": count,
        }
