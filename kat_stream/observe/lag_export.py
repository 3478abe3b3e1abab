"""Lag as metrics: of a run under `kat-stream run`, or of one whose services are started one by one (`lag --serve`).

Invariant: it joins no group; a log that is away for a while leaves the gauges as they were, and with them the time of
the last reading, and is tried again.
"""

from __future__ import annotations

import logging

from kat_stream.errors import DeadlineExceeded, LogError
from kat_stream.observe.stage_lag import stage_lags
from kat_stream.runs import registered
from kat_stream.service import Context
from kat_stream.telemetry import LAG, LAG_READ, LAG_SECONDS, serve_metrics

log = logging.getLogger(__name__)

LAG_EVERY_S = 5.0
MEMBER = "lag"
"""The exporter's name among the run's services."""


async def export_lag(ctx: Context) -> None:
    """Keep the gauges of how far each stage is behind, until `ctx.stopping`."""
    while not ctx.stopping.is_set():
        try:
            for lag in await stage_lags(ctx.log, ctx.run, ctx.run_dir, ctx.log_id):
                LAG.labels(lag.group, lag.topic).set(lag.messages)
                LAG_SECONDS.labels(lag.group, lag.topic).set(lag.seconds or 0.0)
            LAG_READ.set_to_current_time()
        except (LogError, DeadlineExceeded) as error:
            log.warning("lag is not known: %s", error)
        await ctx.stopped_within(LAG_EVERY_S)


async def serve_lag(ctx: Context, port: int) -> None:
    """Export on a /metrics of this process, among the run's targets for Prometheus, until `ctx.stopping`.

    ConfigError if the port is taken.
    """
    host = ctx.config.metrics.host
    server = serve_metrics(host, port)
    url = f"http://{host}:{server.server_port}/metrics"
    try:
        with registered(ctx.run_dir, MEMBER, url):
            print(f"lag of run {ctx.run} at {url}", flush=True)
            await export_lag(ctx)
    finally:
        server.shutdown()
