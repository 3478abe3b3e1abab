"""`kat-stream serve SERVICE`: one service of a run as a process of its own."""

from __future__ import annotations

import argparse
import os
import uuid
from pathlib import Path
from typing import Any

import anyio


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "serve",
        help="run one service of a run as a process of its own",
        description="Joins a run on Kafka with one more process of a service: its partitions are shared out anew.\n"
        "Stop it with Ctrl-C or SIGTERM: it hands its partitions over and nothing is lost.",
        epilog="examples:\n"
        "  kat-stream serve rollout                      one more rollout worker for the newest run\n"
        "  kat-stream serve verifier --run runs/mine --member verifier-2",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "service", help="rollout, verifier, packer, trainer, engine, gateway, sampler, weight_sync, archiver"
    )
    parser.add_argument("--run", default="latest", help="folder of the run, its name, or `latest`")
    parser.add_argument("--member", default="", help="this process's name in its group (default: made up)")
    parser.set_defaults(handler=serve)


def serve(args: argparse.Namespace) -> int:
    from kat_stream.runs import find_run
    from kat_stream.service import load_service
    from kat_stream.telemetry import setup_logging

    service = load_service(args.service)
    run_dir = find_run(args.run)
    member = args.member or f"{args.service}-{uuid.uuid4().hex[:6]}"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    setup_logging()
    anyio.run(_serve, service, run_dir, member)
    return 0


async def _serve(service: Any, run_dir: Path, member: str) -> None:
    from kat_stream.errors import ConfigError
    from kat_stream.log import open_log
    from kat_stream.runs import load_run, registered
    from kat_stream.service import Context
    from kat_stream.signals import stop_on_signal
    from kat_stream.telemetry import serve_metrics

    config = load_run(run_dir)
    if config.log.url.startswith("memory:"):
        raise ConfigError(f"{run_dir} runs in one process (log.url = {config.log.url}): join one on Kafka instead")
    log = open_log(config.log.url, security=config.log.security)
    await log.start()
    ctx = Context(config=config, run=config.run.name, run_dir=run_dir, log=log, member=member)
    metrics = serve_metrics(config.metrics.host, 0)
    url = f"http://{config.metrics.host}:{metrics.server_port}/metrics"
    try:
        with registered(run_dir, member, url):
            async with anyio.create_task_group() as group:
                group.start_soon(stop_on_signal, ctx.stopping)
                await service.run(ctx)
                group.cancel_scope.cancel()
    finally:
        with anyio.CancelScope(shield=True):
            await log.close()
        metrics.shutdown()
