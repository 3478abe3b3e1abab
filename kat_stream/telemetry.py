"""Logs and metrics of a process: one format for lines, one registry, one /metrics endpoint.

Metric names start with `kat_`; SGLang's own names (`sglang:`) are kept for engines. Secrets never reach a line.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from wsgiref.simple_server import WSGIServer

from prometheus_client import Counter, Gauge, Histogram, start_http_server

from kat_stream.errors import ConfigError

ROLLOUTS = Counter("kat_rollouts_total", "Rollouts finished by this process", ["outcome"])
ROLLOUT_SECONDS = Histogram(
    "kat_rollout_seconds", "Wall time of a rollout", buckets=(0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 300, 1800)
)
IN_FLIGHT = Gauge("kat_rollouts_in_flight", "Rollouts running in this process")
GRADED = Counter("kat_gradings_total", "Trajectories graded by this process", ["status"])
PACKED = Counter("kat_groups_total", "Groups resolved by the packer", ["fate"])
HELD = Gauge("kat_groups_held", "Groups of which the packer has something and waits for the rest")
INCOMPLETE = Counter("kat_groups_incomplete_total", "Groups given up: members were missing long after the deadline")
LATE = Counter("kat_groups_late_messages_total", "Messages of groups that were closed before: repeated, or too late")
UNSCORED = Counter("kat_groups_unscored_total", "Groups packed after scorer.wait_s without all their scores")
STEPS = Counter("kat_train_steps_total", "Optimizer steps made")
STEP_SECONDS = Histogram(
    "kat_train_step_seconds", "Time of an optimizer step", buckets=(0.1, 0.5, 1, 2, 5, 10, 60, 600)
)
DAMAGED_CHECKPOINTS = Counter("kat_checkpoints_damaged_total", "Checkpoints passed over because they cannot be read")
TRAIN_BUSY = Counter("kat_train_busy_seconds_total", "Time spent in optimizer steps")
STALENESS = Histogram(
    "kat_staleness_versions", "Versions between sampling and training", buckets=(0, 1, 2, 3, 4, 8, 16)
)
VERSION = Gauge("kat_policy_version", "Newest policy version seen by this process")
SYNC_SECONDS = Histogram(
    "kat_weight_sync_seconds", "Time to move one version to one engine", buckets=(0.05, 0.1, 0.5, 1, 5)
)
ADMITTED = Gauge("kat_groups_admitted", "Groups requested so far")
DEATHS = Counter("kat_service_deaths_total", "Service processes that ended and were started again", ["member", "how"])
DEAD_LETTERS = Counter(
    "kat_dead_letters_total", "Messages that a stage could not use: dead letters written", ["stage", "topic", "error"]
)
LAG = Gauge("kat_lag_messages", "Messages a stage has still to finish", ["stage", "topic"])
LAG_SECONDS = Gauge("kat_lag_seconds", "Age of the oldest message that a stage has not finished", ["stage", "topic"])
LAG_READ = Gauge("kat_lag_read_timestamp_seconds", "When lag was last known, in seconds since 1970; 0: never here")
UNACKNOWLEDGED = Gauge("kat_unacknowledged_seconds", "Age of the oldest send that no broker has acknowledged yet")


def setup_logging(level: str = "INFO", file: Path | None = None) -> None:
    """Lines to stderr or to a file, errors to both. aiokafka reports ordinary events as errors: it is silenced."""
    errors = logging.StreamHandler(sys.stderr)
    errors.setLevel(logging.ERROR if file else level)
    handlers: list[logging.Handler] = [errors, logging.FileHandler(file)] if file else [errors]
    logging.basicConfig(
        level=level, handlers=handlers, force=True, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.raiseExceptions = False  # a full disk under the log file must not bury the terminal in tracebacks
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)


def serve_metrics(host: str, port: int) -> WSGIServer:
    """/metrics of this process on a thread of its own."""
    try:
        server, _ = start_http_server(port, addr=host)
    except OSError as error:
        raise ConfigError(f"metrics.port: {host}:{port} cannot be used ({error.strerror})") from error
    return server
