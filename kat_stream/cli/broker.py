"""`kat-stream broker`: a real Apache Kafka on this machine, without Docker."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kat_stream.cli.common import add_command, add_group

STATE_DIR = Path(".kat/broker")


def register(subparsers: Any) -> None:
    group = add_group(
        subparsers,
        "broker",
        help="a real Apache Kafka on this machine, without Docker",
        description="Starts one Kafka node from Maven's jars (Java 17 or newer and Maven are needed), for work and "
        "tests. Its data live in the state directory and survive a stop.",
    )
    up_parser = add_command(
        group,
        "up",
        up,
        help="start it, or say where it runs",
        description="Returns when the broker answers, and prints its address for --log or log.url.",
        examples=["broker up", "broker up --port 9092 --state-dir /var/tmp/kafka"],
    )
    port = "where it listens (default: the port of last time, or a free one)"
    up_parser.add_argument("--port", type=int, default=0, help=port)
    down_parser = add_command(
        group, "down", down, help="stop it", description="Stops the broker; its data stay.", examples=["broker down"]
    )
    status_parser = add_command(
        group,
        "status",
        status,
        help="whether it runs, and where",
        description="Prints the address of the running broker. The exit code is 1 if none runs.",
        examples=["broker status"],
    )
    state_dir = f"its data and settings (default: {STATE_DIR})"
    for parser in (up_parser, down_parser, status_parser):
        parser.add_argument("--state-dir", type=Path, default=STATE_DIR, help=state_dir)


def up(args: argparse.Namespace) -> int:
    from kat_stream.log import broker

    print(f"kafka:{broker.up(args.state_dir, args.port)}")
    return 0


def down(args: argparse.Namespace) -> int:
    from kat_stream.log import broker

    print("stopped" if broker.down(args.state_dir) else "no broker was running")
    return 0


def status(args: argparse.Namespace) -> int:
    from kat_stream.log import broker

    found = broker.status(args.state_dir)
    print(f"kafka:{found.bootstrap}, pid {found.pid}" if found.running else f"no broker runs in {args.state_dir}")
    return 0 if found.running else 1
