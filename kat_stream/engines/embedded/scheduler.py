"""Continuous batching: which requests run in the next step, and what becomes of them after it.

Owns the queues. Invariant: between two steps every live request is in exactly one of `held`, `waiting`, `prefilling`
and `kv.rows` (decoding); nobody starves, because the queue is first come, first served and only the youngest is
retracted.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from kat_stream.engines.embedded.batch import Chunk, pack
from kat_stream.engines.embedded.request import Request
from kat_stream.engines.embedded.runner import ModelRunner

# Tokens of prefill in one step: about 5 ms of a 1 M parameter model on one core, so decoding never stalls longer.
PREFILL_BUDGET = 512
# Slots left for each running request's next tokens when another one is admitted.
HEADROOM = 8
# A prompt waits for a running prefill that starts with the same tokens, as many as these: it then finds them cached.
SAME_HEAD = 32
# How far the queue is searched for a request that need not wait so.
LOOKAHEAD = 64


@dataclass(slots=True)
class Stats:
    """Counters since start; seconds, tokens, requests."""

    forward_seconds: float = 0.0
    idle_seconds: float = 0.0
    prefill_seconds: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    prefilled_tokens: int = 0
    generated_tokens: int = 0
    retracted: int = 0
    steps: int = 0
    aborted: int = 0


@dataclass(slots=True, eq=False)
class Update:
    """New weights waiting for a moment at which they may be applied; `done` is told None or an error."""

    apply: Callable[[], None]
    flush: bool
    done: Callable[[BaseException | None], None]


@dataclass(slots=True)
class Scheduler:
    """`progress(request, finished)` is called as a streaming request asks for it and at each end."""

    runner: ModelRunner
    max_running: int
    progress: Callable[[Request, bool], None]
    random: np.random.Generator
    waiting: deque[Request] = field(default_factory=deque)
    held: deque[Request] = field(default_factory=deque)
    prefilling: list[Request] = field(default_factory=list)
    updates: deque[Update] = field(default_factory=deque)
    paused: bool = False
    stats: Stats = field(default_factory=Stats)

    # -- what others ask for, between steps -------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Queue a request; it is held back while the engine is paused or drains for an update."""
        (self.held if self.paused or self.updates else self.waiting).append(request)

    def live(self) -> Iterator[Request]:
        """All requests that have not ended."""
        yield from (*self.runner.kv.rows, *self.prefilling, *self.waiting, *self.held)

    def abort(self, chosen: Callable[[Request], bool]) -> None:
        """End the chosen requests with the tokens they have."""
        for request in list(self.live()):
            if chosen(request):
                queued = request.cached < 0
                self._finish(request, {
                    "type": "abort", "message": "Abort in waiting queue" if queued else "Aborted by request",
                    "status_code": None, "err_type": None,
                })  # fmt: skip

    def pause(self, mode: str) -> None:
        """Stop stepping. abort: end all; retract: back to the queue, keys and values given up; in_place: freeze."""
        if mode == "abort":
            self.abort(lambda _: True)
        elif mode == "retract":
            for request in self._youngest_first():
                self._retract(request)
        self.paused = True

    def resume(self) -> None:
        """Step again, also for what arrived meanwhile."""
        self.paused = False
        self._release()

    def flush(self) -> bool:
        """Forget cached prefixes; False while requests run, or wait and are not paused."""
        busy = self._running() > 0 or (bool(self.waiting) and not self.paused)
        if not busy:
            self.runner.kv.flush()
        return not busy

    def update(self, update: Update) -> None:
        """Apply new weights as soon as the engine is paused or has no request in flight."""
        self.updates.append(update)

    def withdraw(self, update: Update) -> None:
        """Forget an update that was not applied yet."""
        if update in self.updates:
            self.updates.remove(update)
            if not self.paused:
                self._release()

    def load(self) -> tuple[int, int, int, int]:
        """Running and queued requests; tokens that the queued ones have to compute; slots that running ones hold."""
        kv = self.runner.kv
        queued = (*self.waiting, *self.held)
        uncached = sum(r.length - kv.cache.match_length(r.tokens()[: r.cacheable()]) for r in queued)
        return self._running(), len(queued), uncached, kv.used

    # -- one step ---------------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Do the next piece of work; False if there is none."""
        if self.updates and (self.paused or not (self._running() or self.waiting)):
            self._apply(self.updates.popleft())
            return True
        if self.paused:
            return False
        self._admit()
        decoding, chunks = self._plan()
        if decoding or chunks:
            self._run(decoding, chunks)
        return bool(decoding or chunks)

    def _apply(self, update: Update) -> None:
        error: BaseException | None = None
        try:
            update.apply()
            if update.flush:
                self.runner.kv.flush()
        except Exception as failure:  # whatever is wrong with the new weights is the caller's answer; serving goes on
            error = failure
        if not self.updates and not self.paused:
            self._release()
        update.done(error)

    def _release(self) -> None:
        if not self.updates:
            self.waiting.extend(self.held)
            self.held.clear()

    def _running(self) -> int:
        return len(self.runner.kv.rows) + len(self.prefilling)

    def _youngest_first(self) -> list[Request]:
        return sorted((*self.runner.kv.rows, *self.prefilling), key=lambda request: -request.admitted)

    def _admit(self) -> None:
        """Move requests from the queue into prefill while slots, room in rows and this step's token budget last."""
        heads: set[bytes] = {self._head(request) for request in self.prefilling}
        budget = PREFILL_BUDGET - sum(r.length - r.computed for r in self.prefilling)
        index = 0
        while index < min(len(self.waiting), LOOKAHEAD) and budget > 0 and self._running() < self.max_running:
            request = self.waiting[index]
            self.runner.kv.attach(request)
            uncached = request.length - request.computed
            head = self._head(request)
            if uncached > SAME_HEAD and head in heads:
                self.runner.kv.detach(request)
                index += 1
                continue
            if uncached + HEADROOM * self._running() > self.runner.kv.available or not self._has_room(request):
                self.runner.kv.detach(request)
                return
            heads.add(head)
            del self.waiting[index]
            self._start(request)
            budget -= uncached

    def _has_room(self, *more: Request) -> bool:
        """Whether a row for every running request, and for `more`, may be as long as the longest of them."""
        running = (*self.runner.kv.rows, *self.prefilling, *more)
        longest = max((request.length for request in running), default=0)
        return self.runner.kv.room(len(running), longest + 1)

    def _head(self, request: Request) -> bytes:
        """The next tokens to compute, with the position they start at."""
        at = request.computed
        return at.to_bytes(8) + request.tokens()[at : at + SAME_HEAD].tobytes()

    def _start(self, request: Request) -> None:
        now = time.perf_counter()
        if request.cached < 0:
            request.cached = request.computed
            request.admitted = now
            self.stats.prompt_tokens += len(request.prompt)
            self.stats.cached_tokens += request.cached
        if request.length - request.computed == 1 and not self._wants_prompt(request):
            self.runner.kv.join_row(request)
        else:
            self.prefilling.append(request)

    @staticmethod
    def _wants_prompt(request: Request) -> bool:
        return request.start + len(request.prompt_logprobs) < len(request.prompt) - 1

    def _plan(self) -> tuple[list[Request], list[Chunk]]:
        """Slots for one more token of every decoding request, then chunks of prefill within the budget."""
        while not self._has_room():
            self._retract(self._youngest_first()[0])
        for request in list(self.runner.kv.rows):
            if request.row >= 0:
                self._secure(request, 1)
        chunks: list[Chunk] = []
        budget = PREFILL_BUDGET
        for request in list(self.prefilling):
            count = min(budget, request.length - request.computed)
            if count == 0 or request not in self.prefilling:
                continue
            if self._secure(request, count):
                chunks.append(Chunk(request, count))
                budget -= count
        # Securing slots for a later request may have retracted an earlier one.
        chunks = [chunk for chunk in chunks if chunk.request.cache is not None]
        self.runner.kv.reserve_rows()
        return list(self.runner.kv.rows), chunks

    def _secure(self, request: Request, count: int) -> bool:
        """Get slots for a request's next `count` tokens, retracting the youngest until they fit; False if it was
        itself."""
        needed = request.computed + count - len(request.slots)
        while needed > 0 and not self.runner.kv.allocate(request, needed):
            victim = self._youngest_first()[0]
            self._retract(victim)
            if victim is request:
                return False
        return True

    def _retract(self, request: Request) -> None:
        if request.output:
            # What was sampled keeps the routing that it was sampled under; a bare prompt takes that of its next run.
            self.runner.kv.note_routes(request)
        self._leave(request)
        request.retractions += 1
        self.stats.retracted += 1
        self.waiting.appendleft(request)

    def _leave(self, request: Request) -> None:
        """Take a request out of wherever it is, giving back its memory."""
        decoding = request.row >= 0
        self.runner.kv.detach(request)
        if decoding:
            return
        for queue in (self.prefilling, self.waiting, self.held):
            if request in queue:
                queue.remove(request)

    def _run(self, decoding: list[Request], chunks: list[Chunk]) -> None:
        step, sampled = pack(decoding, chunks, self.runner.vocab, self.random)
        wanted = [(chunk.request, len(chunk.prompt_rows())) for chunk in chunks]
        begin = time.perf_counter()
        tokens, logprobs, prompt = self.runner.run(step)
        now = time.perf_counter()
        self._count(len(decoding), chunks, now - begin)
        for request in decoding:
            request.computed += 1
        self._after_prefill(chunks)
        for request, count in wanted:
            request.prompt_logprobs.extend(prompt[:count])
            del prompt[:count]
        for request, token, logprob in zip(sampled, tokens, logprobs, strict=True):
            self._accept(request, token, logprob, now)

    def _count(self, decoding: int, chunks: list[Chunk], seconds: float) -> None:
        prefilled = sum(chunk.count for chunk in chunks)
        self.stats.steps += 1
        self.stats.forward_seconds += seconds
        self.stats.prefilled_tokens += prefilled
        if prefilled:
            self.stats.prefill_seconds += seconds * prefilled / (prefilled + decoding)

    def _after_prefill(self, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            complete = chunk.complete
            chunk.request.computed += chunk.count
            if complete:
                self.prefilling.remove(chunk.request)
                self.runner.kv.share(chunk.request)
                self.runner.kv.join_row(chunk.request)

    def _accept(self, request: Request, token: int, logprob: float, now: float) -> None:
        if request.limit == 0:
            self._finish(request, {"type": "length", "length": 0})
            return
        request.accept(token, logprob, self.runner.version)
        self.stats.generated_tokens += 1
        if len(request.output) == 1:
            request.first_token = now
        if (reason := self._stop_reason(request, token)) is not None:
            self._finish(request, reason)
        elif request.body.stream and request.params.streams(len(request.output)):
            self.progress(request, False)

    def _stop_reason(self, request: Request, token: int) -> dict[str, object] | None:
        if token in request.stop_ids:
            return {"type": "stop", "matched": token}
        if stops := request.params.stops():
            # A token is at least a byte of text, so a stop string lies within this many last tokens.
            tail = request.output[-(max(len(stop.encode()) for stop in stops) + 1) :]
            assert self.runner.tokenizer is not None
            text = str(self.runner.tokenizer.decode(tail))
            if (found := next((stop for stop in stops if stop in text), None)) is not None:
                return {"type": "stop", "matched": found}
        if len(request.output) >= request.limit:
            return {"type": "length", "length": request.limit}
        return None

    def _finish(self, request: Request, reason: dict[str, object]) -> None:
        self.runner.kv.note_routes(request)
        self._leave(request)
        request.finish = reason
        request.ended = time.perf_counter()
        self.stats.aborted += reason["type"] == "abort"
        self.progress(request, True)
