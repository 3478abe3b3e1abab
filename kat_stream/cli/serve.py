"""`kat-stream serve SERVICE`: one service of a run as a process of its own."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import os
import uuid
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import anyio

from kat_stream.cli.common import add_command, add_debug
from kat_stream.service import SERVICE_GROUP


def register(subparsers: Any) -> None:
    parser = add_command(
        subparsers,
        "serve",
        serve,
        help="run one service of a run as a process of its own",
        description="Joins a run on Kafka with one more process of a service: its partitions are shared out anew. "
        "Stop it with Ctrl-C or SIGTERM: it hands its partitions over and nothing is lost; one that `kat-stream run` "
        "started is started again by it. The exit code is 0 if it was asked to stop or its work is done (the sampler's "
        "is, at the end of the schedule), 75 if the log was away. "
        "`kat-stream serve SERVICE --help` says what a service reads, writes and commits.",
        examples=["serve rollout", "serve verifier --run runs/mine --member verifier-2"],
    )
    services = parser.add_subparsers(dest="service", metavar="SERVICE", required=True)
    for entry in sorted(entry_points(group=SERVICE_GROUP), key=lambda entry: entry.name):
        header = _header(entry.module)
        service = services.add_parser(
            entry.name,
            help=header.partition("\n")[0].partition(": ")[2],
            description=header,
            epilog=f"examples:\n  kat-stream serve {entry.name} --run latest",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_debug(service)
        service.add_argument("--run", default="latest", help="folder of the run, its name, or `latest`")
        service.add_argument("--member", default="", help="this process's name in its group (default: made up)")


def _header(module: str) -> str:
    """A service file's docstring, read without importing it: no help text loads torch."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return module
    return ast.get_docstring(ast.parse(Path(spec.origin).read_text())) or module


def serve(args: argparse.Namespace) -> int:
    from kat_stream.runs import find_run
    from kat_stream.service import load_service
    from kat_stream.signals import DONE, SUPERVISOR
    from kat_stream.telemetry import setup_logging

    service = load_service(args.service)
    run_dir = find_run(args.run)
    member = args.member or f"{args.service}-x{uuid.uuid4().hex[:6]}"  # a number alone would be its place among several
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    setup_logging()
    done = anyio.run(_serve, service, run_dir, member)
    return DONE if done and SUPERVISOR in os.environ else 0


async def _serve(service: Any, run_dir: Path, member: str) -> bool:
    """Run it to its end; whether it ended because its work is done, and not because it was asked to stop."""
    from kat_stream.errors import ConfigError
    from kat_stream.log.kafka_topics import refuse_repartition, repartitioned
    from kat_stream.runs import load_run, open_run_log, registered
    from kat_stream.service import Context
    from kat_stream.signals import beat, stop_on_signal, stop_with_supervisor
    from kat_stream.telemetry import serve_metrics
    from topics import catalogue

    config = load_run(run_dir)
    if config.log.url.startswith("memory:"):
        raise ConfigError(f"{run_dir} runs in one process (log.url = {config.log.url}): join one on Kafka instead")
    metrics = serve_metrics(config.metrics.host, 0)
    url = f"http://{config.metrics.host}:{metrics.server_port}/metrics"
    log = open_run_log(config, run_dir)
    await log.start()
    try:
        refuse_repartition(repartitioned(catalogue(config.log.partitions), await log.topics()))
        ctx = Context(config=config, run=config.run.name, run_dir=run_dir, log=log, member=member)
        with registered(run_dir, member, url):
            async with anyio.create_task_group() as group:
                group.start_soon(beat)
                group.start_soon(stop_on_signal, ctx.stopping)
                group.start_soon(stop_with_supervisor, ctx.stopping)
                await service.run(ctx)
                done = not ctx.stopping.is_set()
                group.cancel_scope.cancel()
    finally:
        with anyio.CancelScope(shield=True):
            await log.close()
        metrics.shutdown()
    return done
