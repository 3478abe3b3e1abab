"""One model call on the engines: dispatch, another engine when one breaks off, going on after an engine's own abort.

Invariant: a draft's ids, log-probs and spans always agree and only grow; what was sampled before an engine broke off or
a weight update aborted is the beginning of what is sampled after, and the client sees one reply. An engine looks for
stop strings in what it sampled itself: one that two parts make together is seen here, and the draft ends where it is
whole.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from kat_stream.engines.client import EngineClient, Generation, SamplingParams, Span
from kat_stream.errors import DeadlineExceeded, EngineUnavailable
from kat_stream.gateway.ids import joined, written
from kat_stream.gateway.limits import Limits
from kat_stream.gateway.metrics import RESUMED
from kat_stream.routing.router import Router
from topics.turn import VersionSpan

ABORT_PAUSE_S = 0.02
"""Before a call that an engine aborted is sent again: an engine that keeps aborting is not to be hammered."""


@dataclass(slots=True)
class Draft:
    """What was sampled so far: `ids` int[T], `logprobs` float[T], `spans` over [0, T) without gaps."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    spans: list[VersionSpan] = field(default_factory=list)
    finish_reason: str = ""
    matched_stop: str = ""
    """The stop string that ended it."""
    engine: str = ""
    cached_tokens: int = 0
    queued_s: float = 0.0
    seconds: float = 0.0
    routed: bytes = b""
    """Routed experts, uint16, a row a token."""
    routed_rows: int = 0

    def routing(self, rows: int) -> bytes:
        """The routed experts of so many tokens; empty unless all of them are known."""
        whole = self.routed_rows == rows > 0 and len(self.routed) % (2 * rows) == 0
        return self.routed if whole else b""

    def cover(self) -> bool:
        """Give ids without a known version a span of their own, named ""; whether there was none."""
        known = self.spans[-1].end if self.spans else 0
        if known < len(self.ids):
            self.spans.append(VersionSpan("", known, len(self.ids)))
        return all(span.version for span in self.spans)

    def close_part(self, start: int, generation: Generation, rows: int = 0) -> None:
        """One engine's part, from `start` on, is complete; `rows` of routed experts belong to it."""
        del self.ids[start:], self.logprobs[start:]
        self.ids += generation.output_ids
        self.logprobs += generation.logprobs
        for span in generation.spans:
            self._cover(start, span)
        if isinstance(generation.matched, str):
            self.matched_stop = generation.matched
        if generation.routed_experts and generation.output_ids:
            self.routed += generation.routed_experts
            self.routed_rows += rows
        self.seconds += generation.seconds
        if start == 0:
            self.cached_tokens = generation.cached_tokens

    def stop_at(self, end: int, stop: str) -> None:
        """The first `end` ids make a stop string whole: what was sampled behind them is dropped."""
        rows = max(self.routed_rows - (len(self.ids) - end), 0)
        self.routed = self.routed[: len(self.routed) // max(self.routed_rows, 1) * rows]
        self.routed_rows = rows
        del self.ids[end:], self.logprobs[end:]
        self.spans = [VersionSpan(s.version, s.start, min(s.end, end)) for s in self.spans if s.start < end]
        self.finish_reason, self.matched_stop = "stop", stop

    def _cover(self, start: int, span: Span) -> None:
        last = self.spans[-1] if self.spans else None
        if last is not None and last.version == span.version and last.end == start + span.start:
            self.spans[-1] = VersionSpan(span.version, last.start, start + span.end)
        elif span.end > span.start:
            self.spans.append(VersionSpan(span.version, start + span.start, start + span.end))


@dataclass(slots=True)
class Sampler:
    """Samples one call. `abort()` ends it from outside; `grown` is called when ids were added, but the last."""

    router: Router
    limits: Limits
    session: str
    call_id: str
    prompt: bytes
    """Its ids as the inside of a JSON list."""
    prompt_tokens: int
    sampling: SamplingParams
    budget: int
    """Tokens that may be sampled."""
    decode: Callable[[Sequence[int]], str]
    stream: bool
    grown: Callable[[], None]
    routed_from: int = 0
    """First position of the path whose routed experts are recorded, if engines are asked for them."""
    draft: Draft = field(default_factory=Draft)
    aborted: bool = False
    _at: tuple[EngineClient, str] | None = None

    @property
    def dispatched(self) -> bool:
        """Whether an engine has seen the call."""
        return self._at is not None

    async def run(self) -> Draft:
        """The finished draft. EngineUnavailable after too many engines, EngineRejected, DeadlineExceeded."""
        began = time.monotonic()
        give_up = began + self.limits.call_s
        failures = attempt = 0
        while not self._finished():
            left = give_up - time.monotonic()
            if left <= 0:
                raise DeadlineExceeded("an engine to finish the call", self.limits.call_s)
            attempt += 1
            try:
                await self._part(f"{self.call_id}n{attempt:03d}", left, began)
            except EngineUnavailable:
                failures += 1
                if self.aborted or failures >= self.limits.engine_attempts:
                    raise
                RESUMED.labels("engine").inc()
        return self.draft

    async def abort(self) -> None:
        """End the call where it runs; it then finishes with what it has. EngineError, DeadlineExceeded."""
        self.aborted = True
        if self._at is not None:
            engine, rid = self._at
            await engine.abort(rid)

    def _finished(self) -> bool:
        draft = self.draft
        if self.aborted and self._at is not None:
            draft.finish_reason = "abort"
        elif not draft.finish_reason and len(draft.ids) >= self.budget:
            draft.finish_reason = "length"
        return bool(draft.finish_reason)

    async def _part(self, rid: str, left: float, began: float) -> None:
        """Sample on one engine until it finishes, aborts or breaks off."""
        self.draft.cover()
        start = len(self.draft.ids)
        tokens = self.prompt_tokens + self.budget
        async with self.router.lease(self.session, tokens, deadline_s=left) as state:
            if self._at is None:
                self.draft.queued_s = time.monotonic() - began
            self._at, self.draft.engine = (state.engine, rid), state.url
            generation = await self._generate(state.engine, rid, left, start)
        if len(generation.logprobs) != len(generation.output_ids) or (generation.text and not generation.output_ids):
            # Text is not what was sampled: without the ids there is nothing to record, so there is no reply either.
            raise EngineUnavailable(f"{state.url}: an answer without the ids or log-probabilities of its text")
        first = self.routed_from + self.draft.routed_rows
        self.draft.close_part(start, generation, self.prompt_tokens + start + len(generation.output_ids) - 1 - first)
        seam = _across(self.draft.ids, start, self.sampling.stop, self.decode)
        if seam is not None:
            self.draft.stop_at(*seam)
        elif generation.finish_reason != "abort":
            self.draft.finish_reason = generation.finish_reason
        # What comes last is shown with the end of the reply, when it is recorded: to show it before takes a write more.
        if not self.draft.finish_reason and not self.aborted:
            self.grown()
            RESUMED.labels("abort").inc()
            await asyncio.sleep(ABORT_PAUSE_S)

    async def _generate(self, engine: EngineClient, rid: str, left: float, start: int) -> Generation:
        ids = msgspec.Raw(b"".join((b"[", joined(self.prompt, written(self.draft.ids)), b"]")))
        first = self.routed_from + self.draft.routed_rows
        sampling = self.sampling
        if start:
            sampling = msgspec.structs.replace(sampling, max_new_tokens=self.budget - start)
        if not self.stream:
            return await engine.generate(ids, sampling, rid=rid, routed_from=first, deadline_s=left)
        final: Generation | None = None
        async for part in engine.generate_stream(ids, sampling, rid=rid, routed_from=first, deadline_s=left):
            final = part.final
            if final is None:
                self.draft.ids += part.output_ids
                self.draft.logprobs += part.logprobs
                self.grown()
        assert final is not None  # every stream ends with it, or raises
        return final


def _across(
    ids: Sequence[int], seam: int, stops: Sequence[str], decode: Callable[[Sequence[int]], str]
) -> tuple[int, str] | None:
    """The number of ids that first make a stop string whole which begins before the seam, and that string.

    A token is a byte at least, so no stop string reaches farther than its bytes on either side.
    """
    reach = max((len(stop.encode(errors="surrogatepass")) for stop in stops), default=0)
    if not seam or not reach:
        return None
    first = max(seam - reach, 0)
    before = len(decode(ids[first:seam]))
    whole = decode(ids[first : seam + reach])  # most seams have none, and need no look at each id behind them
    if not any(0 <= whole.find(stop) < before for stop in stops):
        return None
    for end in range(seam + 1, min(seam + reach, len(ids)) + 1):
        text = decode(ids[first:end])
        if (stop := next((stop for stop in stops if 0 <= text.find(stop) < before), None)) is not None:
            return end, stop
    return None
