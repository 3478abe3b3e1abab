"""`kat-stream demo`: the small policy learns to mend repositories, on a laptop, in minutes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

CONFIG = Path(__file__).parents[1] / "demo" / "demo.toml"


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="train the small policy that ships with the package on small repositories",
        description="Evaluates a small policy on held-out repositories, trains it by agents in sandboxes and\n"
        "evaluates it again. With --log memory everything runs in this process; with --log kafka a real\n"
        "Apache Kafka is started (Java and Maven are needed, Docker is not) and every service is a process.",
        epilog="examples:\n"
        "  kat-stream demo                          about ten minutes on two cores\n"
        "  kat-stream demo --seed 1 --set run.steps=10\n"
        "  kat-stream demo --log kafka              then, elsewhere: kat-stream tail trajectories",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order of tasks")
    parser.add_argument("--log", choices=("memory", "kafka"), default="memory", help="where records flow")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one setting")
    parser.set_defaults(handler=demo)


def demo(args: argparse.Namespace) -> int:
    import msgspec

    from kat_stream.cli.broker import STATE_DIR
    from kat_stream.cli.run import conduct
    from kat_stream.config import load
    from kat_stream.log import broker
    from kat_stream.runs import create_run
    from kat_stream.sandboxing import or_local

    config = load(CONFIG, [f"run.seed={args.seed}", *args.set])
    section, reason = or_local(config.rollout)
    if reason:
        print(f"demo: WARNING: no isolation: {config.rollout.sandbox}: {reason}", file=sys.stderr)
        print("demo: WARNING: the policy's commands run as you, on this machine", file=sys.stderr)
    config = msgspec.structs.replace(config, rollout=section)
    if args.log == "memory":
        config, run_dir = create_run(config)
        return conduct("demo", config, run_dir, resume=False)
    bootstrap = broker.up(STATE_DIR)
    config = msgspec.structs.replace(config, log=msgspec.structs.replace(config.log, url=f"kafka:{bootstrap}"))
    config, run_dir = create_run(config)
    try:
        return conduct("demo", config, run_dir, resume=False)
    finally:
        broker.down(STATE_DIR)
