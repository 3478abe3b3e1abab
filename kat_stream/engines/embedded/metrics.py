"""The engine's numbers under SGLang's metric names, so that one dashboard serves both.

Owns the names. Invariant: counters are read from the scheduler's own counts, never counted twice; seconds, tokens,
requests.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kat_stream.engines.embedded.request import Request
from kat_stream.engines.embedded.scheduler import Scheduler

LATENCY = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class _Counts(Collector):
    def __init__(self, scheduler: Scheduler, model: str) -> None:
        self._scheduler = scheduler
        self._model = model

    def collect(self) -> Iterator[Metric]:
        for name, value, text in self._counters():
            counter = CounterMetricFamily(f"sglang:{name}", text, labels=["model_name"])
            counter.add_metric([self._model], value)
            yield counter
        for name, value, text in self._gauges():
            gauge = GaugeMetricFamily(f"sglang:{name}", text, labels=["model_name"])
            gauge.add_metric([self._model], value)
            yield gauge

    def _counters(self) -> Iterator[tuple[str, float, str]]:
        stats = self._scheduler.stats
        yield "prompt_tokens", stats.prompt_tokens, "Prompt tokens of admitted requests"
        yield "cached_tokens", stats.cached_tokens, "Prompt tokens found in the prefix cache"
        yield "generation_tokens", stats.generated_tokens, "Tokens generated"
        yield "evicted_tokens", self._scheduler.runner.kv.evicted, "Tokens evicted from the prefix cache"
        yield "num_retracted_requests", stats.retracted, "Times a request went back to the queue"
        yield "num_aborted_requests", stats.aborted, "Requests aborted"
        yield "forward_execution_seconds", stats.forward_seconds, "Seconds in the model's forward"
        yield "scheduler_idle_seconds", stats.idle_seconds, "Seconds without anything to run"

    def _gauges(self) -> Iterator[tuple[str, float, str]]:
        scheduler = self._scheduler
        kv = scheduler.runner.kv
        yield "num_running_reqs", len(kv.rows) + len(scheduler.prefilling), "Requests running"
        yield "num_queue_reqs", len(scheduler.waiting) + len(scheduler.held), "Requests queued"
        yield "num_paused_reqs", len(scheduler.held), "Requests held back by a pause or an update"
        yield "kv_used_tokens", kv.used, "Slots that running requests hold"
        yield "kv_evictable_tokens", kv.cache.evictable, "Slots of cached prefixes nobody reads"
        yield "kv_available_tokens", kv.available - kv.cache.evictable, "Free slots"
        yield "token_usage", kv.used / kv.total, "Share of slots that running requests hold"
        prompt = scheduler.stats.prompt_tokens
        hits = scheduler.stats.cached_tokens / prompt if prompt else 0.0
        yield "cache_hit_rate", hits, "Cached share of prompt tokens"


class Metrics:
    """A registry of its own, so that several engines live in one process."""

    def __init__(self, scheduler: Scheduler, model: str) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Counts(scheduler, model))
        self._first = self._histogram("time_to_first_token_seconds", "Arrival to first token", model)
        self._whole = self._histogram("e2e_request_latency_seconds", "Arrival to last token", model)
        self._queue = self._histogram("queue_time_seconds", "Arrival to admission", model)

    def _histogram(self, name: str, text: str, model: str) -> Histogram:
        family = Histogram(f"sglang:{name}", text, ["model_name"], registry=self.registry, buckets=LATENCY)
        return family.labels(model)

    def observe(self, request: Request) -> None:
        """Record the latencies of a request that generated something and ended."""
        if request.output:
            self._first.observe(request.first_token - request.arrived)
            self._whole.observe(request.ended - request.arrived)
            self._queue.observe(request.admitted - request.arrived)
