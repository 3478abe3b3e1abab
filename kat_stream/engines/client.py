"""A client for engines that speak SGLang's HTTP contract: SGLang itself and the embedded engine.

Owns the mapping of HTTP to our types and errors. Invariants: every call has a deadline, and a call that is given up
(deadline, cancellation) closes its connection, which ends the request on the engine. Shapes: SGLang 0.5.23,
research/routing_streaming.md C1 and C2.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import aiohttp
import msgspec

from kat_stream.errors import DeadlineExceeded, EngineRejected, EngineUnavailable

CONTROL_SECONDS = 60.0
UPDATE_SECONDS = 600.0
REST_SECONDS = 0.25
"""How long the end of a stream is waited for when its last answer is there."""
# A cumulative chunk of a long stream is one line; it may be as long as the whole answer.
LINE_BYTES = 64 * 1024 * 1024
MAX_STOPS = 16
MAX_STOP_BYTES = 256
"""Of one call's stop strings: behind every sampled token each is looked for, and while that is done others wait."""

PauseMode = Literal["abort", "retract", "in_place"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to sample; what is left at its default is left to the engine. `temperature` 0 is greedy."""

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    sampling_seed: int | None = None
    stream_interval: int | None = None
    """A stream's first piece comes with the first token, then one every so many tokens, and the last at the end."""


class Span(msgspec.Struct, frozen=True):
    """Output tokens [start, end) were sampled with the weights called `version`."""

    version: str
    start: int
    end: int


class Generation(msgspec.Struct, frozen=True, kw_only=True):
    """What was sampled. `logprobs` are natural logarithms under softmax(logits / temperature), one an output id,
    empty if not asked for; `matched` is the stop id or string; counts in tokens; `seconds` as the client saw it."""

    output_ids: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length", "abort"]
    matched: int | str | None
    cached_tokens: int
    prompt_tokens: int
    spans: list[Span]
    seconds: float
    text: str = ""
    routed_experts: bytes = b""
    """uint16, row-major, a row a token from the asked one to the last but one; empty: not asked for, or incomplete."""


class Prefill(msgspec.Struct, frozen=True, kw_only=True):
    """What one prefill says of a given text: natural logarithms, one a scored id, and the weights that said it."""

    logprobs: list[float]
    version: str
    cached_tokens: int


class Increment(msgspec.Struct, frozen=True, kw_only=True):
    """What a stream adds: new ids and log-probs, and after the last ones the whole `Generation`."""

    output_ids: list[int]
    logprobs: list[float]
    final: Generation | None = None


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """One data-parallel rank's load: requests, tokens of keys and values, tokens waiting for prefill."""

    num_running_reqs: int = 0
    num_waiting_reqs: int = 0
    num_waiting_uncached_tokens: int = 0
    num_used_tokens: int = 0
    max_total_num_tokens: int = 0
    max_running_requests: int = 0
    token_usage: float = 0.0
    total_prefill_uncached_tokens: int = 0
    total_prefill_busy_us: int = 0


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine serves."""

    model_path: str
    weight_version: str
    served_model_name: str = ""


class _Loads(msgspec.Struct):
    loads: list[Load]


class _Finish(msgspec.Struct):
    type: str
    matched: int | str | list[int] | None = None
    message: str | None = None
    status_code: int | None = None


class _Meta(msgspec.Struct):
    finish_reason: _Finish | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    weight_version: str = ""
    weight_versions: list[Span] | None = None
    output_token_logprobs: list[tuple[float | None, int, Any]] | None = None
    input_token_logprobs: list[tuple[float | None, int, Any]] | None = None
    routed_experts: str | None = None


class _Answer(msgspec.Struct):
    meta_info: _Meta | None = None
    output_ids: list[int] = []
    text: str = ""
    error: dict[str, Any] | None = None


def _generation(answer: _Answer, seconds: float) -> Generation:
    """The final answer as our type; raises EngineUnavailable when the engine ended the request with an error of its
    own."""
    meta = answer.meta_info
    if meta is None or meta.finish_reason is None:
        raise EngineUnavailable("the engine ended its answer without a finish reason")
    finish = meta.finish_reason
    if finish.type not in ("stop", "length", "abort"):
        raise EngineUnavailable(f"the engine finished with {finish.type}: {finish.message}")
    if finish.type == "abort" and (finish.status_code or 0) >= 400:
        kind = EngineRejected if (finish.status_code or 0) < 500 else EngineUnavailable
        raise kind(f"engine: {finish.message}")
    count = len(answer.output_ids)
    spans = meta.weight_versions
    if spans is None:
        spans = [Span(meta.weight_version, 0, count)] if count else []
    return Generation(
        output_ids=answer.output_ids, logprobs=_logprobs(meta, 0), finish_reason=finish.type,  # type: ignore[arg-type]
        matched=finish.matched[-1] if isinstance(finish.matched, list) else finish.matched,
        cached_tokens=meta.cached_tokens, prompt_tokens=meta.prompt_tokens, spans=spans, seconds=seconds,
        text=answer.text, routed_experts=_experts(meta.routed_experts or ""),
    )  # fmt: skip


def _experts(text: str) -> bytes:
    """Base64 of little-endian int32 as bytes of uint16, without a detour over numbers: there may be millions."""
    if not text:
        return b""
    try:
        wide = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise EngineUnavailable(f"/generate: routed_experts: {error}") from error
    if len(wide) % 4 or any(wide[2::4]) or any(wide[3::4]):
        raise EngineUnavailable(f"/generate: routed_experts: {len(wide)} bytes that are no int32 in [0, 65535]")
    narrow = bytearray(len(wide) // 2)
    narrow[0::2], narrow[1::2] = wide[0::4], wide[1::4]
    return bytes(narrow)


def _logprobs(meta: _Meta, start: int) -> list[float]:
    return [float("-inf") if entry[0] is None else entry[0] for entry in (meta.output_token_logprobs or [])[start:]]


def _decode[T](raw: bytes, kind: type[T], what: str) -> T:
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.DecodeError as error:
        raise EngineUnavailable(f"{what}: an answer that is not the contract's: {error}") from error


def _message(raw: bytes) -> str:
    """The message in an error body of either shape that SGLang uses, else its text."""
    try:
        body = msgspec.json.decode(raw)
    except msgspec.DecodeError:
        return raw[:500].decode(errors="replace")
    error = body.get("error", body) if isinstance(body, dict) else body
    return str(error.get("message", error) if isinstance(error, dict) else error)


class EngineClient:
    """One engine. Every method raises EngineUnavailable (refused, reset, 5xx), EngineRejected (4xx),
    DeadlineExceeded. `record_routing`: calls that name a first token ask for the experts of it and those after."""

    def __init__(self, base_url: str, session: aiohttp.ClientSession, *, record_routing: bool = False) -> None:
        self.base_url = base_url.rstrip("/")
        self.record_routing = record_routing
        self._session = session

    async def generate(
        self, input_ids: list[int] | msgspec.Raw, sampling: SamplingParams, *, rid: str, return_logprob: bool = True,
        routed_from: int | None = None, deadline_s: float
    ) -> Generation:  # fmt: skip
        """Sample after `input_ids`, or a JSON list of them. An abort is not an error: it returns the tokens so far."""
        begin = time.monotonic()
        body = _body(input_ids, sampling, rid, return_logprob, stream=False) | self._routing(routed_from)
        raw = await self._call("POST", "/generate", body, deadline_s)
        answer = _decode(raw, _Answer, "/generate")
        return _generation(answer, time.monotonic() - begin)

    async def generate_stream(
        self, input_ids: list[int] | msgspec.Raw, sampling: SamplingParams, *, rid: str, return_logprob: bool = True,
        routed_from: int | None = None, deadline_s: float
    ) -> AsyncIterator[Increment]:  # fmt: skip
        """The same as increments; the last one has `final`. `deadline_s` bounds the whole stream."""
        begin = time.monotonic()
        body = _body(input_ids, sampling, rid, return_logprob, stream=True) | self._routing(routed_from)
        known = 0
        async with self._request("POST", "/generate", body, deadline_s) as response:
            last = _Answer()
            async for line in response.content:
                if not line.startswith(b"data:") or line.strip() == b"data: [DONE]":
                    continue
                last = _decode(line[5:], _Answer, "/generate")
                if last.error is not None:
                    raise EngineUnavailable(f"/generate: {last.error.get('message', last.error)}")
                fresh, logprobs = last.output_ids[known:], _logprobs(last.meta_info or _Meta(), known)
                known = len(last.output_ids)
                if last.meta_info is not None and last.meta_info.finish_reason is not None:
                    break
                yield Increment(output_ids=fresh, logprobs=logprobs)
            else:
                raise EngineUnavailable("/generate: the stream ended before its answer")
            final = _generation(last, time.monotonic() - begin)
            await _to_the_end(response)
        yield Increment(output_ids=fresh, logprobs=logprobs, final=final)

    async def prefill(
        self, input_ids: list[int], start: int, *, rid: str, bypass_cache: bool = False, deadline_s: float
    ) -> Prefill:
        """Log-probabilities of `input_ids[start:]` (start >= 1) at temperature 1, by one prefill that samples nothing.

        Keys and values from `start` on are computed anew, those before it may come from the prefix cache, unless
        `bypass_cache`. EngineUnavailable also for an answer that does not hold them all.
        """
        body = _body(input_ids, SamplingParams(max_new_tokens=0, temperature=1.0), rid, True, stream=False)
        body["logprob_start_len"] = 0 if bypass_cache else start - 1
        answer = _decode(await self._call("POST", "/generate", body, deadline_s), _Answer, "/generate")
        _generation(answer, 0.0)
        meta = answer.meta_info
        assert meta is not None
        found = (meta.input_token_logprobs or [])[-(len(input_ids) - start) :]
        values = [entry[0] for entry in found if entry[0] is not None]
        if [entry[1] for entry in found] != input_ids[start:] or len(values) != len(found):
            raise EngineUnavailable(f"/generate: log-probs of {len(values)} tokens for {len(input_ids) - start}")
        return Prefill(logprobs=values, version=meta.weight_version, cached_tokens=meta.cached_tokens)

    async def abort(self, rid: str = "", *, abort_all: bool = False) -> None:
        """End requests whose id STARTS with `rid`, or all; unknown ids are ignored. Use ids of one length."""
        await self._call("POST", "/abort_request", {"rid": rid, "abort_all": abort_all}, CONTROL_SECONDS)

    async def loads(self) -> list[Load]:
        """The load of each data-parallel rank."""
        return _decode(await self._call("GET", "/v1/loads", None, CONTROL_SECONDS), _Loads, "/v1/loads").loads

    async def pause(self, mode: PauseMode) -> None:
        """Stop generating: abort all | retract (recomputed later, exact) | in_place (freeze, old keys and values
        stay)."""
        await self._call("POST", "/pause_generation", {"mode": mode}, CONTROL_SECONDS)

    async def resume(self) -> None:
        """Go on after `pause`."""
        await self._call("POST", "/continue_generation", {}, CONTROL_SECONDS)

    async def flush(self) -> None:
        """Forget cached prefixes; EngineRejected while requests run."""
        await self._call("POST", "/flush_cache", {}, CONTROL_SECONDS)

    async def update_weights(
        self, path: Path, version: str, *, flush_cache: bool = True, deadline_s: float = UPDATE_SECONDS
    ) -> None:  # fmt: skip
        """Load a safetensors directory that the engine can read. Unless paused, the engine first finishes what is in
        flight."""
        body = {"model_path": str(path), "weight_version": version, "flush_cache": flush_cache}
        await self._call("POST", "/update_weights_from_disk", body, deadline_s)

    async def info(self) -> ModelInfo:
        """Model and weight version."""
        return _decode(await self._call("GET", "/model_info", None, CONTROL_SECONDS), ModelInfo, "/model_info")

    async def health(self, deadline_s: float = 5.0) -> bool:
        """Whether the engine answers that it is well; never raises."""
        try:
            await self._call("GET", "/health", None, deadline_s)
        except (EngineUnavailable, EngineRejected, DeadlineExceeded):
            return False
        return True

    def _routing(self, first: int | None) -> dict[str, Any]:
        if first is None or not self.record_routing:
            return {}
        return {"return_routed_experts": True, "routed_experts_start_len": first}

    async def _call(self, method: str, path: str, body: Any, seconds: float) -> bytes:
        async with self._request(method, path, body, seconds) as response:
            return await response.read()

    @asynccontextmanager
    async def _request(
        self, method: str, path: str, body: Any, seconds: float
    ) -> AsyncIterator[aiohttp.ClientResponse]:  # fmt: skip
        """A response with status 2xx; errors of the transport and of HTTP become ours, also while the body is read."""
        payload = None if body is None else msgspec.json.encode(body)
        headers = {"Content-Type": "application/json"} if payload is not None else None
        limit = aiohttp.ClientTimeout(total=seconds)
        try:
            async with self._session.request(
                method, self.base_url + path, data=payload, headers=headers, timeout=limit,
                read_bufsize=LINE_BYTES, max_line_size=LINE_BYTES,
            ) as response:  # fmt: skip
                if response.status >= 300:
                    message = f"{path}: {response.status}: {_message(await response.read())}"
                    raise EngineRejected(message) if 400 <= response.status < 500 else EngineUnavailable(message)
                yield response
        except TimeoutError as error:
            raise DeadlineExceeded(f"{self.base_url}{path}", seconds) from error
        except (aiohttp.ClientError, OSError) as error:
            raise EngineUnavailable(f"{self.base_url}{path}: {error or type(error).__name__}") from error


async def _to_the_end(response: aiohttp.ClientResponse) -> None:
    """Read past a stream's last answer: its connection serves the next call then. One that does not end is closed."""
    if response.content.is_eof():  # all of it is here, and the connection is free
        return
    with suppress(TimeoutError, aiohttp.ClientError):
        async with asyncio.timeout(REST_SECONDS):
            await response.content.read()


def _body(
    ids: list[int] | msgspec.Raw, sampling: SamplingParams, rid: str, return_logprob: bool, *, stream: bool
) -> dict[str, Any]:
    params = msgspec.to_builtins(sampling)
    # Token ids are what we keep: the text may lose nothing.
    params |= {"skip_special_tokens": False, "spaces_between_special_tokens": False, "no_stop_trim": True}
    return {
        "input_ids": ids, "sampling_params": params, "rid": rid, "return_logprob": return_logprob, "stream": stream,
    }  # fmt: skip
