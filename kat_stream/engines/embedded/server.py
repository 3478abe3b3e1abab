"""SGLang's HTTP contract over the embedded engine.

Owns the listener and the live request ids. Invariant: an id is live at most once, and a client that goes away ends its
request. Shapes: SGLang 0.5.23, research/routing_streaming.md C1 and C2. Where it differs, on purpose:
`max_new_tokens` beyond the context is clamped (SGLang answers 400), and an update that flushes under an in_place
pause also hides the old prefixes.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
import numpy as np
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from transformers import PreTrainedModel

from kat_stream.engines.embedded.metrics import Metrics
from kat_stream.engines.embedded.request import GenerateBody, Request, SamplingBody
from kat_stream.engines.embedded.runner import Dtype, ModelRunner, load_weights, require_room
from kat_stream.engines.embedded.scheduler import Update
from kat_stream.engines.embedded.worker import Worker, within
from kat_stream.errors import DeadlineExceeded, EngineRejected, EngineUnavailable

# A control call waits at most for one step; an update also for all requests in flight, unless the engine is paused.
CONTROL_SECONDS = 60.0
UPDATE_SECONDS = 600.0
HEALTH_SECONDS = 20.0
MAX_BODY = 64 * 1024 * 1024

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class AbortBody(msgspec.Struct, frozen=True):
    """Body of POST /abort_request."""

    rid: str = ""
    abort_all: bool = False


class PauseBody(msgspec.Struct, frozen=True):
    """Body of POST /pause_generation."""

    mode: str = "abort"


class UpdateBody(msgspec.Struct, frozen=True):
    """Body of POST /update_weights_from_disk."""

    model_path: str
    weight_version: str | None = None
    flush_cache: bool = True
    abort_all_requests: bool = False


def _json(payload: Any, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(payload), status=status, content_type="application/json")


def _error(message: str, status: int) -> web.Response:
    return _json({"error": {"message": message, "type": "BadRequestError" if status == 400 else "ServerError"}}, status)


async def _parse[T](request: web.Request, kind: type[T]) -> T:
    """The body as `kind`; raises EngineRejected naming the field. NaN is let through to the checks that name it."""
    raw = await request.read() or b"{}"
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        raise EngineRejected(str(error)) from error
    except msgspec.DecodeError:
        pass
    try:
        return msgspec.convert(json.loads(raw), kind)
    except (ValueError, msgspec.ValidationError) as error:
        raise EngineRejected(f"body: {error}") from error


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except EngineRejected as error:
        return _error(str(error), 400)
    except (EngineUnavailable, DeadlineExceeded) as error:
        return _error(str(error), 503)


class EngineServer:
    """A running engine: `url` is where it listens, `close()` ends it. Made by `start_engine`."""

    def __init__(self, runner: ModelRunner, worker: Worker, model_name: str) -> None:
        self.url = ""
        self.runner = runner
        self.worker = worker
        self.model_name = model_name
        self._metrics = Metrics(worker.scheduler, model_name)
        self._live: set[str] = set()
        self._app_runner = web.AppRunner(self._app(), handler_cancellation=True, access_log=None, shutdown_timeout=2.0)

    async def listen(self, host: str, port: int) -> None:
        """Open the listener; port 0 takes a free one."""
        await self._app_runner.setup()
        site = web.TCPSite(self._app_runner, host, port, backlog=1024)
        await site.start()
        bound = self._app_runner.addresses[0]
        self.url = f"http://{host}:{bound[1]}"

    async def close(self) -> None:
        """End all requests with an error, then the listener and the model's thread."""
        await self.worker.close()
        await self._app_runner.cleanup()

    def _app(self) -> web.Application:
        app = web.Application(middlewares=[_errors], client_max_size=MAX_BODY)
        app.router.add_post("/generate", self._generate)
        app.router.add_put("/generate", self._generate)
        app.router.add_post("/abort_request", self._abort)
        app.router.add_post("/pause_generation", self._pause)
        app.router.add_post("/continue_generation", self._continue)
        app.router.add_route("*", "/flush_cache", self._flush)
        app.router.add_post("/update_weights_from_disk", self._update)
        for path, handler in (
            ("/v1/loads", self._loads), ("/model_info", self._model_info), ("/server_info", self._server_info),
            ("/health", self._health), ("/health_generate", self._health_generate), ("/metrics", self._metrics_page),
        ):  # fmt: skip
            app.router.add_get(path, handler)
        return app

    # -- generation -------------------------------------------------------------------------------------------------

    async def _generate(self, http: web.Request) -> web.StreamResponse:
        request = self._request(await _parse(http, GenerateBody))
        if request.rid in self._live:
            raise EngineRejected(f"rid {request.rid!r}: a request with this id is in flight")
        self._live.add(request.rid)
        try:
            queue = await self.worker.submit(request)
            if request.body.stream:
                return await self._stream(http, request, queue)
            return _json(await self._finished(request, queue))
        finally:
            # A request that has not ended here has lost its client.
            self.worker.drop(request)
            self._live.discard(request.rid)

    async def _finished(self, request: Request, queue: asyncio.Queue[tuple[int, bool]]) -> dict[str, Any]:
        """The whole answer. No deadline here: a paused engine may hold a request for as long as its client waits."""
        count, finished = await queue.get()
        while not finished:
            count, finished = await queue.get()
        if count < 0:
            raise EngineUnavailable("the engine was closed while it generated")
        self._metrics.observe(request)
        return self._answer(request, count, True)

    async def _stream(
        self, http: web.Request, request: Request, queue: asyncio.Queue[tuple[int, bool]]
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        await response.prepare(http)
        finished = False
        while not finished:
            count, finished = await queue.get()
            while not finished and not queue.empty():
                count, finished = queue.get_nowait()
            if count < 0:
                chunk: Any = {"error": {"message": "the engine was closed while it generated", "code": 503}}
            else:
                chunk = self._answer(request, count, finished)
            await response.write(b"data: " + msgspec.json.encode(chunk) + b"\n\n")
        if request.finish is not None:
            self._metrics.observe(request)
        await response.write(b"data: [DONE]\n\n")
        return response

    def _request(self, body: GenerateBody) -> Request:
        body.sampling_params.check()
        prompt = self._prompt(body)
        room = self.runner.context - len(prompt)
        asked = body.sampling_params.max_new_tokens
        if room < (0 if asked == 0 else 1):
            raise EngineRejected(
                f"The input ({len(prompt)} tokens) is longer than the model's context length"
                f" ({self.runner.context} tokens, the last of them for output)."
            )
        params = body.sampling_params
        if params.stops() and self.runner.tokenizer is None:
            raise EngineRejected("stop: the model directory has no tokenizer; use stop_token_ids")
        self._check_routing(body, len(prompt))
        stop_ids = frozenset() if params.ignore_eos else self.runner.eos | set(params.stop_token_ids or ())
        return Request(
            rid=body.rid or uuid4().hex, prompt=prompt, params=params,
            limit=room if asked is None else min(asked, room), start=self._start(body, len(prompt)),
            stop_ids=stop_ids, body=body, arrived=time.perf_counter(),
        )  # fmt: skip

    def _check_routing(self, body: GenerateBody, length: int) -> None:
        if body.return_routed_experts and self.runner.kv.routes is None:
            raise EngineRejected("return_routed_experts: the engine was started without --enable-return-routed-experts")
        if not 0 <= body.routed_experts_start_len < length:
            raise EngineRejected(
                f"routed_experts_start_len must be in [0, {length}), got {body.routed_experts_start_len}"
            )

    def _prompt(self, body: GenerateBody) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        ids = body.input_ids
        if ids is None and body.text is not None and self.runner.tokenizer is not None:
            ids = self.runner.tokenizer.encode(body.text)
        if not ids:
            raise EngineRejected("input_ids: at least one token is needed (text only with a tokenizer)")
        low, high = min(ids), max(ids)
        if low < 0 or high >= self.runner.vocab:
            bad = low if low < 0 else high
            raise EngineRejected(f"input_ids: token id {bad} is out of range [0, {self.runner.vocab})")
        return np.array(ids, np.int32)

    @staticmethod
    def _start(body: GenerateBody, length: int) -> int:
        if not body.return_logprob or body.logprob_start_len == -1:
            return length
        if not 0 <= body.logprob_start_len < length:
            raise EngineRejected(f"logprob_start_len must be -1 or in [0, {length}), got {body.logprob_start_len}")
        return body.logprob_start_len

    def _answer(self, request: Request, count: int, finished: bool) -> dict[str, Any]:
        return request.answer(count, self._text(request, count), self.runner.version, finished)

    def _text(self, request: Request, count: int) -> str:
        """Output as text, without the stop token or string unless no_stop_trim; empty without a tokenizer."""
        if self.runner.tokenizer is None:
            return ""
        matched = (request.finish or {}).get("matched") if count == len(request.output) else None
        trim = not request.params.no_stop_trim
        ids = request.output[: count - (trim and isinstance(matched, int))]
        text = str(self.runner.tokenizer.decode(ids, skip_special_tokens=request.params.skip_special_tokens))
        return text[: text.find(matched)] if trim and isinstance(matched, str) and matched in text else text

    # -- control ----------------------------------------------------------------------------------------------------

    async def _abort(self, http: web.Request) -> web.Response:
        body = await _parse(http, AbortBody)
        if body.abort_all or body.rid:
            scheduler, prefix = self.worker.scheduler, "" if body.abort_all else body.rid
            await self.worker.call(lambda: scheduler.abort(lambda r: r.rid.startswith(prefix)), CONTROL_SECONDS)
        return web.Response()

    async def _pause(self, http: web.Request) -> web.Response:
        mode = (await _parse(http, PauseBody)).mode
        if mode not in ("abort", "retract", "in_place"):
            raise EngineRejected(f"mode must be abort, retract or in_place, got {mode!r}")
        await self.worker.call(lambda: self.worker.scheduler.pause(mode), CONTROL_SECONDS)
        return _json({"message": f"Generation paused ({mode}).", "status": "ok"})

    async def _continue(self, http: web.Request) -> web.Response:
        await self.worker.call(self.worker.scheduler.resume, CONTROL_SECONDS)
        return _json({"message": "Generation continued.", "status": "ok"})

    async def _flush(self, http: web.Request) -> web.Response:
        """Waits up to ?timeout= seconds for an idle engine."""
        deadline = time.monotonic() + float(http.query.get("timeout", 0))
        while not await self.worker.call(self.worker.scheduler.flush, CONTROL_SECONDS):
            if time.monotonic() >= deadline:
                return web.Response(text="Flush cache failed: requests are running.\n", status=400)
            await asyncio.sleep(0.01)
        return web.Response(text="Cache flushed.\n")

    async def _update(self, http: web.Request) -> web.Response:
        body = await _parse(http, UpdateBody)
        try:
            # Loaded and checked while the old weights serve; only the copy happens between two steps.
            loading = asyncio.to_thread(load_weights, Path(body.model_path))
            source = await within(UPDATE_SECONDS, loading, "the new weights to be loaded")
            frozen = await self._apply(body, source)
        except (EngineUnavailable, DeadlineExceeded):  # says nothing of the weights: may be asked for again
            raise
        except Exception as failure:  # SGLang's contract: whatever went wrong is the answer; the old weights serve on
            return _json({"success": False, "message": str(failure) or repr(failure), "num_paused_requests": 0}, 400)
        return _json({"success": True, "message": "Weights updated.", "num_paused_requests": frozen})

    async def _apply(self, body: UpdateBody, source: PreTrainedModel) -> int:
        """Replace the weights when that may be; returns how many requests were frozen meanwhile."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[BaseException | None] = loop.create_future()
        path, version = Path(body.model_path), body.weight_version or self.runner.version
        update = Update(
            apply=lambda: self.runner.replace(source, path, version), flush=body.flush_cache,
            done=lambda error: _resolve_from_thread(loop, done, error),
        )  # fmt: skip
        try:
            frozen: int = await self.worker.call(
                lambda: self._enqueue(update, body.abort_all_requests), CONTROL_SECONDS
            )
            if (error := await within(UPDATE_SECONDS, done, "requests in flight to end")) is not None:
                raise error
        finally:
            # Given up, by deadline or by the caller: it must not hold back requests, nor come true later.
            self.worker.post(lambda: self.worker.scheduler.withdraw(update))
        return frozen

    def _enqueue(self, update: Update, abort: bool) -> int:
        scheduler = self.worker.scheduler
        if abort:
            scheduler.abort(lambda _: True)
        scheduler.update(update)
        return len(list(scheduler.live())) if scheduler.paused else 0

    # -- information ------------------------------------------------------------------------------------------------

    async def _loads(self, http: web.Request) -> web.Response:
        running, queued, uncached, used = await self.worker.call(self.worker.scheduler.load, CONTROL_SECONDS)
        stats, total = self.worker.scheduler.stats, self.runner.kv.total
        load = {
            "dp_rank": 0, "num_running_reqs": running, "num_waiting_reqs": queued,
            "num_waiting_uncached_tokens": uncached, "num_used_tokens": used, "num_total_tokens": used + uncached,
            "max_total_num_tokens": total, "max_running_requests": self.worker.scheduler.max_running,
            "token_usage": used / total, "utilization": running / self.worker.scheduler.max_running,
            "cache_hit_rate": stats.cached_tokens / stats.prompt_tokens if stats.prompt_tokens else 0.0,
            "total_prefill_uncached_tokens": stats.prefilled_tokens,
            "total_prefill_busy_us": int(stats.prefill_seconds * 1e6),
        }  # fmt: skip
        return _json({"timestamp": time.time(), "version": "kat-embedded", "loads": [load]})

    async def _model_info(self, http: web.Request) -> web.Response:
        config = self.runner.model.config
        return _json({
            "model_path": str(self.runner.path), "served_model_name": self.model_name, "is_generation": True,
            "tokenizer_path": str(self.runner.path), "weight_version": self.runner.version, "load_format": "auto",
            "model_type": config.model_type, "architectures": config.architectures,
        })  # fmt: skip

    async def _server_info(self, http: web.Request) -> web.Response:
        return _json({
            "model_path": str(self.runner.path), "served_model_name": self.model_name, "device": "cpu",
            "dtype": self.runner.dtype, "context_length": self.runner.context, "vocab_size": self.runner.vocab,
            "max_total_num_tokens": self.runner.kv.total, "max_running_requests": self.worker.scheduler.max_running,
            "traced": self.runner.traced, "internal_states": [{"paused": self.worker.scheduler.paused}],
            "version": "kat-embedded",
        })  # fmt: skip

    async def _health(self, http: web.Request) -> web.Response:
        return web.Response(status=503 if self.worker.failure else 200)

    async def _health_generate(self, http: web.Request) -> web.Response:
        body = GenerateBody(input_ids=[0], sampling_params=SamplingBody(max_new_tokens=1))
        request = self._request(body)
        queue = await self.worker.submit(request)
        try:
            await asyncio.wait_for(self._finished(request, queue), HEALTH_SECONDS)
        except TimeoutError:
            return web.Response(status=503)
        finally:
            self.worker.drop(request)
        return web.Response()

    async def _metrics_page(self, http: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})


def _resolve_from_thread(
    loop: asyncio.AbstractEventLoop, future: asyncio.Future[BaseException | None], error: BaseException | None
) -> None:
    def resolve() -> None:
        if not future.done():
            future.set_result(error)

    loop.call_soon_threadsafe(resolve)


async def start_engine(
    model_dir: Path, *, host: str = "127.0.0.1", port: int = 0, model_name: str, max_total_tokens: int,
    max_running: int,
    weight_version: str = "default", threads: int | None = 1, dtype: Dtype = "float32", record_routing: bool = False,
) -> EngineServer:  # fmt: skip
    """Serve a Hugging Face model directory on the CPU; loading takes place outside the event loop.

    `max_total_tokens`: slots of keys and values (>= 128, also bounds a single request); `max_running`: requests
    decoded at once; `threads`: torch threads of the model's own thread (None: torch's default). One is the default
    because threads that spin for a core somebody else uses made steps 10 to 100 times slower on a shared 2-core
    machine. `dtype`: of weights, keys and values. `record_routing`: requests may ask for the experts of their tokens.
    Raises DataError for a directory that cannot be loaded, ConfigError for an architecture or size that
    cannot be served.
    """
    require_room(max_total_tokens, max_running)
    runner = await asyncio.to_thread(
        ModelRunner, model_dir, max_total_tokens, weight_version, dtype, record_routing=record_routing
    )
    server = EngineServer(runner, Worker(runner, max_running, threads), model_name)
    await server.listen(host, port)
    return server
